"""Write the API's document as JSON (``make openapi``).

Usage: ``python -m local.openapi [--check]``

The layer has no YAML library, so it ships ``openapi.json``. People read and edit ``openapi.yaml``, from which the JSON
is made: without spaces, as the API sends it.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCE = CHECKOUT / "layers/predictions/predictions/api/openapi.yaml"
TARGET = SOURCE.with_suffix(".json")


def main() -> int:
    """Write or check the file; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m local.openapi", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that the file is up to date")
    if not parser.parse_args().check:
        TARGET.write_text(as_json(SOURCE.read_text(encoding="utf-8")), encoding="ascii")
    elif not is_current():
        print(f"{TARGET.name} is not up to date with {SOURCE.name}. Run make openapi", file=sys.stderr)
        return 1
    return 0


def as_json(text: str) -> str:
    """Convert the document from YAML to one line of JSON.

    Characters beyond ASCII are escaped, as in every other response of the API.
    """
    return json.dumps(yaml.safe_load(text), separators=(",", ":"), allow_nan=False)


def is_current() -> bool:
    """Return whether ``openapi.json`` is up to date."""
    return TARGET.exists() and TARGET.read_text(encoding="ascii") == as_json(SOURCE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())

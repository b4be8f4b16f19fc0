"""Write the price book that the layer ships (``make prices``).

Usage: ``python -m local.prices [--check]``

The layer has no YAML library, so it ships ``prices.json``, made of the checked files of ``prices/``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from predictions.money.book import BookInvalid, check_book

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = CHECKOUT / "prices"
TARGET = CHECKOUT / "layers/predictions/predictions/money/prices.json"


class _Texts(yaml.SafeLoader):
    """Reads dates as the texts that they are written as."""


def _as_written(_: _Texts, node: yaml.Node) -> str:
    return str(node.value)


_Texts.add_constructor("tag:yaml.org,2002:timestamp", _as_written)


def main() -> int:
    """Write or check the file; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m local.prices", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that the file is up to date")
    try:
        text = as_json([path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.yaml"))])
    except BookInvalid as error:
        print(f"prices/: {error}", file=sys.stderr)
        return 1
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="ascii")
    elif not TARGET.exists() or TARGET.read_text(encoding="ascii") != text:
        print(f"{TARGET.name} is not up to date with prices/. Run make prices", file=sys.stderr)
        return 1
    return 0


def as_json(sources: list[str]) -> str:
    """Join the files to one book, check it, and return it as one line of JSON.

    Raises:
        BookInvalid: It is invalid.
    """
    book: dict[str, Any] = {}
    for text in sources:
        entries = yaml.load(text, Loader=_Texts)  # noqa: S506  # a safe loader
        if twice := sorted(book.keys() & entries.keys()):
            raise BookInvalid(twice[0], "is in two files.")
        book |= entries
    return json.dumps(check_book(book), separators=(",", ":"), allow_nan=False, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main())

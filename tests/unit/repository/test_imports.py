"""What a function imports at its cold start: packages that cost much are only where they are needed."""

import ast
import json
import subprocess
import sys

from tests.support import library
from tests.support.template import ROOT

# Each costs at least a tenth of a botocore client (`python -m tests.benchmarks`).
OF_REPLICATE = {
    "advance_pipeline", "call_replicate", "cancel_prediction", "deliver_webhook", "deploy_recipes", "manage_batches",
    "manage_pipelines", "manage_recipes", "poll_prediction", "run_prediction", "start_prediction",
    "submit_prediction", "sweep_predictions",
}  # fmt: skip
OF_BODIES = {
    "advance_pipeline", "deploy_recipes", "finish_batch", "manage_batches", "manage_pipelines", "manage_recipes",
    "poll_prediction", "prepare_batch", "run_prediction", "start_from_queue", "start_prediction", "store_files",
    "submit_prediction", "sweep_predictions",
}  # fmt: skip
IMPORTERS: dict[str, set[str]] = {
    "httpx": OF_REPLICATE,
    "pydantic_core": OF_BODIES,
    "pydantic": set(),
    "asyncio": set(),
    "aws_lambda_powertools.event_handler": set(),
    "aws_lambda_powertools.utilities.data_classes": set(),
    "aws_xray_sdk": set(),
    "boto3": set(),
    "predictions.money.budgets": {"publish_changes"},  # the others import it with the first budget
}

# Imports what each handler imports, in a fork of its own: no handler runs, so no environment is needed.
PROBE = """
import json, os, sys
import botocore.session
for name, imports in json.loads(sys.argv[1]).items():
    if not os.fork():
        exec(imports, {})
        print(json.dumps([name, [each for each in json.loads(sys.argv[2]) if each in sys.modules]]), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, name
"""


def loaded() -> dict[str, set[str]]:
    """Those of `IMPORTERS` that each function imports before its first event."""
    imports = {}
    for path in sorted((ROOT / "functions").glob("*/app.py")):
        lines = [each for each in ast.parse(path.read_text()).body if isinstance(each, ast.Import | ast.ImportFrom)]
        imports[path.parent.name] = "\n".join(map(ast.unparse, lines))
    command = [sys.executable, "-c", PROBE, json.dumps(imports), json.dumps(list(IMPORTERS))]
    environment = {"PYTHONPATH": str(library.LIBRARY.parent), "POWERTOOLS_METRICS_NAMESPACE": "x"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603  # our own
    return {name: set(found) for name, found in map(json.loads, done.stdout.splitlines())}


def test_costly_packages_are_imported_only_by_functions_that_need_them() -> None:
    found = loaded()
    assert len(found) == len(list((ROOT / "functions").glob("*/app.py")))
    importers = {package: {name for name, packages in found.items() if package in packages} for package in IMPORTERS}
    assert importers == IMPORTERS


def test_no_module_imports_what_costs_much_later_either() -> None:
    # Within functions too: what a first request imports costs it more than the start, which has a whole processor.
    for path in library.LIBRARY.rglob("*.py"):
        if path.relative_to(library.LIBRARY).parts[0] == "cli":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [each.module or "" for each in nodes if isinstance(each, ast.ImportFrom)]
        names += [name.name for each in nodes if isinstance(each, ast.Import) for name in each.names]
        refused = ("pydantic", "boto3", "aws_lambda_powertools.event_handler")
        assert not [name for name in names if any(name == each or name.startswith(f"{each}.") for each in refused)], (
            path
        )

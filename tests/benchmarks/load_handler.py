"""Imports a handler as Lambda does and writes what that took: run by `tests.benchmarks.imports` in a new process.

What is measured comes first: whatever this file imported before would be missing from the handler's bill.
"""

import sys
import time

modules_before = len(sys.modules)
cpu_before = time.process_time_ns()
import app  # type: ignore[import-not-found]  # noqa: E402  # the line that is measured; on the path only there

cpu_after = time.process_time_ns()
modules_after = len(sys.modules)

import json  # noqa: E402  # not before: handlers import it too

if not callable(app.handler):
    raise TypeError(f"{app.__file__} has no handler")
json.dump(
    {
        "process_ms": cpu_after / 1e6,
        "import_ms": (cpu_after - cpu_before) / 1e6,
        "modules": modules_after - modules_before,
    },
    sys.stdout,
)

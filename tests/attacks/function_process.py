"""Runs one invocation of a function in this process, which stands for Lambda's: `killed` starts it and kills it.

    python -m tests.attacks.function_process FUNCTION PIPE < event.json

To the file descriptor PIPE it writes a line when the handler begins, and one with the answer and the peak of its memory
when it has returned; what the handler logs goes to stdout. The variable PARSED_LIMIT_BYTES takes the place of the
library's constant.
"""

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any


class _Context:
    function_name = "function"
    function_version = "$LATEST"
    invoked_function_arn = "arn:aws:lambda:us-east-1:123456789012:function:function"
    aws_request_id = "c6af9ac6-7b61-11e6-9a41-93e8deadbeef"

    def __init__(self, memory_mb: int, seconds: int) -> None:
        self.memory_limit_in_mb = memory_mb
        self._until = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        return int((self._until - time.monotonic()) * 1000)


def main() -> None:
    function, pipe = sys.argv[1], int(sys.argv[2])
    event: Any = json.load(sys.stdin)
    if limit := os.environ.get("PARSED_LIMIT_BYTES"):
        importlib.import_module("predictions.upstream.prediction").PARSED_LIMIT_BYTES = int(limit)  # type: ignore[attr-defined]
    app = importlib.import_module(f"functions.{function}.app")
    context = _Context(int(os.environ["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]), int(os.environ["TIMEOUT_SECONDS"]))
    os.write(pipe, b"began\n")
    answer: Any = None
    error: str | None = None
    try:
        answer = app.handler(event, context)
    except Exception as raised:  # noqa: BLE001  # a function that raises has ended by itself
        error = repr(raised)
    # An answer of 6 MB is JSON again on its way to Lambda.
    told = json.dumps({"answer": answer, "error": error, "peak": _peak_bytes()}).encode()
    while told:
        told = told[os.write(pipe, told) :]


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()

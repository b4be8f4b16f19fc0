"""Functions: their processes, their errors and their logs.

The emulator unpacks a function's layer again for each of its workers: half a second, and 25 MB to remove in the end.
Here workers share it.

The emulator reports every error of a function as `Runtime.HandlerError`. AWS reports the class of the exception, and a
state machine catches it by that name. The class is in the traceback that the emulator keeps for the function's log.

Each invocation without a free process starts a new one, so that a burst starts dozens, each slowed down by the others.
Here each function starts one at a time, and an invocation takes the first one that is free.

If a function's process dies, the emulator reports its own error; AWS reports `Runtime.ExitError`, and so does this.

A number that comes from a template's parameter stays a text in the emulator; the concurrency of a queue is read as one.

The emulator's own log lacks the lines of most invocations: here they are a file, `functions.log`.
"""

import functools
import hashlib
import re
import tempfile
import threading
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ministack.core import lambda_runtime
from ministack.services import lambda_svc

from local.emulator.logs import append

# The last line of a traceback: `package.module.ClassName: message`.
RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+)(?::|$)", re.MULTILINE | re.ASCII)

# The emulator's error for a function whose process has ended.
DIED = "Worker process died"

SECONDS_TO_START = 10


def with_log(execute: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Log what a function has written."""

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        result = execute(*args, **options)
        if text := result.get("log"):
            append("functions.log", str(text))
        return result

    return run


def named(execute: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Report the class of a function's exception, or how its process died."""

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        result = execute(*args, **options)
        body = result.get("body")
        if isinstance(body, dict) and body.get("errorType") == "Runtime.HandlerError":
            message = str(body.get("errorMessage", ""))
            if message == DIED:
                exited = "RequestId: unknown Error: Runtime exited with error: signal: killed"
                body.update(errorType="Runtime.ExitError", errorMessage=exited)
                return result
            last = str(result.get("log", "")).rstrip().removesuffix(message).rstrip().rpartition("\n")[2]
            if raised := RAISED.match(last):
                body["errorType"] = raised[1]
        return result

    return run


def known_to_start(spawn: Callable[..., None]) -> Callable[..., None]:
    """Mark a worker whose process is starting."""

    @functools.wraps(spawn)
    def run(worker: Any) -> None:
        worker.starting = True
        try:
            spawn(worker)
        finally:
            worker.starting = False

    return run


def one_at_a_time(acquire: Callable[..., Any]) -> Callable[..., Any]:
    """Wait for a free worker of a function while another one is starting."""

    @functools.wraps(acquire)
    def run(name: str, config: dict[str, Any], code: bytes, qualifier: str = "$LATEST", **options: Any) -> Any:
        key = lambda_runtime._worker_key(name, config, qualifier)
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            with lambda_runtime._lock:
                workers = lambda_runtime._workers.get(key, [])
                workers.sort(key=lambda worker: worker._proc is None)  # the emulator takes the first one that is free
                free = any(worker._proc and not worker.in_use for worker in workers)
                starting = any(worker.in_use and (not worker._proc or worker.starting) for worker in workers)
            if free or not starting or time.monotonic() > deadline:
                return acquire(name, config, code, qualifier=qualifier, **options)
            time.sleep(0.01)

    return run


class Archive(zipfile.ZipFile):
    """An archive of a function or a layer; a layer is unpacked once and linked to from then on."""

    unpacking = threading.Lock()

    def extractall(self, path: Any = None, members: Any = None, pwd: bytes | None = None) -> None:
        """Unpack into `path`, or link it to the same layer if unpacked before."""
        archive, folder = Path(str(self.filename)), Path(path)
        if not archive.name.startswith("layer_"):
            return super().extractall(folder, members, pwd)
        shared = Path(tempfile.gettempdir()) / f"layer-{hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}"
        with self.unpacking:
            if not shared.exists():
                unfinished = tempfile.mkdtemp(dir=shared.parent)
                super().extractall(unfinished, members, pwd)
                Path(unfinished).rename(shared)
        folder.rmdir()
        folder.symlink_to(shared)
        return None


def with_whole_number(limit_of: Callable[..., int]) -> Callable[..., int]:
    """Read the concurrency of an event source as a number, as AWS does; a text ends the emulator's polling."""

    @functools.wraps(limit_of)
    def limit(mapping: dict[str, Any], *others: Any, **options: Any) -> int:
        scaling = mapping.get("ScalingConfig") or {}
        scaling |= {name: int(value) for name, value in scaling.items() if name == "MaximumConcurrency"}
        return limit_of(mapping, *others, **options)

    return limit


def patch() -> None:
    """Change the emulator."""
    lambda_runtime.zipfile = types.SimpleNamespace(**{**vars(zipfile), "ZipFile": Archive})
    lambda_runtime.Worker._spawn = known_to_start(lambda_runtime.Worker._spawn)
    lambda_runtime.Worker.starting = False
    lambda_svc._sqs_esm_concurrency = with_whole_number(lambda_svc._sqs_esm_concurrency)
    lambda_svc.acquire_worker = one_at_a_time(lambda_svc.acquire_worker)
    lambda_svc._execute_function_warm = with_log(named(lambda_svc._execute_function_warm))

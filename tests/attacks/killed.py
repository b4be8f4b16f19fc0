"""Functions as Lambda runs them: each invocation a process of its own, killed at its own memory and time.

Both limits are the template's. AWS and Replicate are this process's, behind sockets: what they hold is not the
function's memory. AWS is that of the simulation (its table evaluates the real expressions), Replicate says what the
test says.
"""

import base64
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from predictions.aws import clients
from predictions.files.outputs_bucket import OutputsBucket
from predictions.store.predictions import PredictionsTable

from tests.support.dynamodb import ConditionFailed, Table
from tests.support.fixtures import ENVIRONMENT, SECRETS
from tests.support.template import ROOT, load_template, logical_name, timeout_of, variables

_FULL_PROCESSOR_MB = 1769
"""The memory at which a function has a whole processor: https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html"""

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_WATCH_SECONDS = 0.005
# Beyond the function's own time: this machine is shared, and only the processor's time is held against a function.
_HANGING_SECONDS = 60


@dataclass(frozen=True)
class Run:
    """What became of one invocation.

    Attributes:
        killed: `memory` or `time`, by what Lambda would have killed it; None where it ended.
        peak_bytes: The most memory that was seen of it.
        seconds: Of a processor of its share: what Lambda would have taken for the computing.
        answer: What the handler returned.
        error: What it raised.
    """

    killed: str | None
    peak_bytes: int
    seconds: float
    answer: Any = None
    error: str | None = None


class Cloud:
    """AWS and Replicate on one socket of this machine.

    Attributes:
        table: The table's items.
        objects: What is in buckets, by bucket and key.
        executions: The status of each execution, by name.
        messages: What was sent to queues.
        told: What state machines of others were told.
        replicate: Replicate's answers, by method and path below `/v1`; what is not here is a 404.
        asked: What Replicate was asked, as method and path.
        files: Files of the file host, by path.
        now: The clock of the table's reader; functions have their own.
    """

    def __init__(self) -> None:
        self.table = Table(time.time)
        self.objects: dict[str, bytes] = {}
        self.executions: dict[str, str] = {}
        self.messages: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.secrets = dict(SECRETS)
        self.replicate: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.asked: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.hooks: list[bytes] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- what tests do with it --------------------------------------------------------------------------------

    def predictions(self) -> PredictionsTable:
        """The table, by the library's own reader and writer."""
        return PredictionsTable("predictions", OutputsBucket("outputs"), clients.client("dynamodb"))

    def invoke(self, function: str, event: Any, **environment: str) -> Run:
        """Runs a function of the template once."""
        properties = load_template()["Resources"][logical_name(function)]["Properties"]
        memory_mb, timeout_seconds = int(properties["MemorySize"]), timeout_of(logical_name(function))
        given = variables(logical_name(function))
        own = {name: value for name, value in ENVIRONMENT.items() if name.startswith("AWS_") or name in given}
        own |= {"REPLICATE_API_URL": f"{self.url}/replicate/v1"} if "REPLICATE_API_URL" in given else {}
        own |= {"FILE_ORIGINS": self.url} if "FILE_ORIGINS" in given else {}
        own |= {"ALLOW_LOOPBACK_WEBHOOKS": "true"} if "ALLOW_LOOPBACK_WEBHOOKS" in given else {}
        own |= {
            "PATH": os.environ["PATH"], "AWS_ENDPOINT_URL": self.url, "POWERTOOLS_LOG_LEVEL": "CRITICAL",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(memory_mb), "TIMEOUT_SECONDS": str(timeout_seconds), **environment,
        }  # fmt: skip
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "tests.attacks.function_process", function, str(writing)]
        process = subprocess.Popen(  # noqa: S603  # our own program
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=own, cwd=ROOT, pass_fds=[writing]
        )
        os.close(writing)
        try:
            stdin = process.stdin
            assert stdin is not None
            with stdin:
                stdin.write(json.dumps(event).encode())
            run = _watch(process, reading, memory_mb, timeout_seconds)
            return _noted(function, run, bounded="PARSED_LIMIT_BYTES" not in environment)
        finally:
            os.close(reading)
            if process.poll() is None:
                process.kill()
            process.wait()

    # -- what functions ask of it -----------------------------------------------------------------------------

    def answer(self, request: "_Handler", body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """One request."""
        target = request.headers.get("X-Amz-Target")
        path = request.path.partition("?")[0]
        with self._lock:
            if target:
                return self._aws(target.partition("_")[0].partition(".")[0], target.rpartition(".")[2], body)
            if path.startswith("/replicate/v1"):
                return self._replicate(request.command, path.removeprefix("/replicate/v1"))
            if path.startswith("/files/"):
                found = self.files.get(path)
                return (200, found, {"Content-Type": "image/png"}) if found is not None else (404, b"", {})
            if path == "/hook":
                self.hooks.append(body)
                return 200, b"", {}
            return self._s3(request, body)

    def _replicate(self, method: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        self.asked.append((method, path))
        if path == "/webhooks/default/secret":
            return 200, json.dumps({"key": "whsec_" + base64.b64encode(b"s" * 32).decode()}).encode(), {}
        status, told = self.replicate.get((method, path), (404, b'{"detail": "not found"}'))
        return status, told, {"Content-Type": "application/json"}

    def _aws(self, service: str, operation: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = json.loads(body)
        try:
            if service == "DynamoDB":
                return _ok(self.table.call(operation, asked))
            return _ok(getattr(self, f"_{operation}")(asked))
        except ConditionFailed as failed:
            item = {"Item": failed.item} if failed.item is not None else {}
            return 400, json.dumps({"__type": "x#ConditionalCheckFailedException", "message": "", **item}).encode(), {}
        except _Refused as refused:
            return 400, json.dumps({"__type": f"x#{refused}", "message": ""}).encode(), {}

    def _StartExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802  # the operation's name
        if self.executions.get(asked["name"], "RUNNING") != "RUNNING":
            raise _Refused("ExecutionAlreadyExists")
        self.executions[asked["name"]] = "RUNNING"
        return {"executionArn": asked["name"], "startDate": 0}

    def _DescribeExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = asked["executionArn"].rpartition(":")[2]
        if name not in self.executions:
            raise _Refused("ExecutionDoesNotExist")
        return {"executionArn": name, "status": self.executions[name], "startDate": 0, "stateMachineArn": "m"}

    def _SendTaskSuccess(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.told.append(asked)
        return {}

    _SendTaskFailure = _SendTaskSuccess

    def _GetParameter(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"Parameter": {"Name": asked["Name"], "Value": "https://api.example.com/v1"}}

    def _GetSecretValue(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"ARN": "arn", "Name": asked["SecretId"], "SecretString": self.secrets[asked["SecretId"]]}

    def _PutSecretValue(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.secrets[asked["SecretId"]] = asked["SecretString"]
        return {}

    def _SendMessage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.messages.append(asked)
        return {"MessageId": "m"}

    def _PutEvents(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.events += asked["Entries"]
        return {"FailedEntryCount": 0, "Entries": [{"EventId": "e"} for _ in asked["Entries"]]}

    def _s3(self, request: "_Handler", body: bytes) -> tuple[int, bytes, dict[str, str]]:
        key = request.path.partition("?")[0].lstrip("/")
        match request.command:
            case "PUT":
                self.objects[key] = body
                return 200, b"", {"ETag": '"etag"'}
            case "GET" | "HEAD" if key in self.objects:
                return 200, self.objects[key], {"ETag": '"etag"', "Content-Type": "application/json"}
            case "GET":
                return 404, b"<Error><Code>NoSuchKey</Code></Error>", {"Content-Type": "application/xml"}
        return (404 if request.command == "HEAD" else 204), b"", {}


class _Refused(Exception):
    """AWS refuses, by this code."""


def _ok(answer: Mapping[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(answer, default=_json).encode(), {"Content-Type": "application/x-amz-json-1.0"}


def _json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that is killed leaves in the middle of what it is sent.
    handle_error = lambda *_: None  # noqa: E731

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cloud = cloud


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        status, told, headers = cast("_Server", self.server).cloud.answer(self, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _do  # noqa: N815  # http.server's names


def _watch(process: "subprocess.Popen[bytes]", pipe: int, memory_mb: int, timeout_seconds: int) -> Run:
    """Does what Lambda does: the initialization is not counted, and then a process is killed at its limits."""
    limit_bytes = memory_mb * 1024 * 1024
    share = min(1.0, memory_mb / _FULL_PROCESSOR_MB)
    peak, before, began = 0, 0.0, time.monotonic()
    told = bytearray()

    def killed(why: str, seconds: float) -> Run:
        process.kill()
        return Run(why, peak, seconds)

    while True:
        readable, _, _ = select.select([pipe], [], [], _WATCH_SECONDS)
        if readable:
            piece = os.read(pipe, 1 << 20)
            if not piece:
                break
            told += piece
        used = _used(process.pid)
        if used is None:
            continue
        memory, cpu = used
        peak = max(peak, memory)
        if b"\n" not in told:
            before, began = cpu, time.monotonic()
            continue
        seconds = (cpu - before) / share
        if memory > limit_bytes:
            return killed("memory", seconds)
        if seconds > timeout_seconds or time.monotonic() - began > timeout_seconds + _HANGING_SECONDS:
            return killed("time", seconds)
    process.wait()
    line = bytes(told).partition(b"\n")[2]
    assert line, f"the process ended by itself: {process.returncode}"
    ended = json.loads(line)
    peak = max(peak, ended["peak"])
    return Run("memory" if peak > limit_bytes else None, peak, seconds, ended["answer"], ended["error"])


def _noted(function: str, run: Run, *, bounded: bool) -> Run:
    """Adds the peak of a run to the file that the variable MEMORY_PEAKS names, from which `make bench` takes it."""
    if bounded and run.killed is None and (path := os.environ.get("MEMORY_PEAKS")):
        with Path(path).open("a") as peaks:
            peaks.write(f"{function} {run.peak_bytes >> 20}\n")
    return run


def _used(pid: int) -> tuple[int, float] | None:
    """Resident bytes and processor seconds of a process; None where it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(pages[1]) * _PAGE_BYTES, (int(stat[11]) + int(stat[12])) / _TICKS


@contextmanager
def cloud() -> Iterator[Cloud]:
    """An empty account, which this process's clients have too, and a Replicate that knows nothing."""
    cloud = Cloud()
    try:
        with pytest.MonkeyPatch.context() as here:
            here.setenv("AWS_ENDPOINT_URL", cloud.url)
            clients._client.cache_clear()
            yield cloud
    finally:
        clients._client.cache_clear()
        cloud.close()


def api_event(
    method: str, resource: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """An event of the API, of a caller with every scope."""
    asked = {"Content-Type": "application/json", **(headers or {})}
    name = re.search(r"\{(\w+)\}", resource)
    return {
        "resource": resource, "path": path, "httpMethod": method, "headers": asked,
        "multiValueHeaders": {each: [value] for each, value in asked.items()},
        "queryStringParameters": None, "multiValueQueryStringParameters": None,
        "pathParameters": {name[1]: path.split("/")[2]} if name else None, "stageVariables": None,
        "requestContext": {
            "requestId": "r", "requestTimeEpoch": int(time.time() * 1000), "stage": "v1", "path": f"/v1{path}",
            "httpMethod": method, "identity": {},
            "authorizer": {"owner": "alice", "scopes": "predict read manage train"},
        },
        "body": base64.b64encode(body).decode() if body is not None else None, "isBase64Encoded": body is not None,
    }  # fmt: skip

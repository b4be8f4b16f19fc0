"""A proxy at the AWS endpoint of deployed functions: it passes calls on, and on demand kills who makes one.

Nothing in the product knows of it: the functions' `AWS_ENDPOINT_URL` points here. It knows the calling function by its
access key and the operation by the request; the process that calls is the one at the other end of the connection.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from local.cloud import LocalCloud

ID = re.compile(r"(?<![a-z0-9])[a-z0-9]{26}(?![a-z0-9])")
_CREDENTIAL = re.compile(r"Credential=([^/]+)/\d+/[^/]+/([^/]+)/")
_S3 = {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject", "POST": "PostObject"}
# What an update of a prediction sets tells which of its writes it is.
_TELLING = ("cancel_requested", "copy_until", "execution_n", "files_json")
_LONGEST_HEAD = 256 * 1024


class Fault(StrEnum):
    """What may happen to a call."""

    KILLED_BEFORE = "killed before"
    """The process of the function is killed, and the call is never made."""
    KILLED_AFTER = "killed after"
    """The call is made; then the process is killed, and the answer reaches nobody."""
    LOST = "answer lost"
    """The call is made, and the connection is reset before its answer."""
    REFUSED = "refused"
    """The call is not made; its answer is a 500 (`InternalServerError`), which AWS's SDK tries again."""
    THROTTLED = "throttled"
    """The call is not made; its answer is a 400 (`ThrottlingException`), which AWS's SDK tries again."""


KILLS = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)


@dataclass(frozen=True, order=True)
class Call:
    """Which call of which function.

    Attributes:
        function: The name of its folder.
        operation: `dynamodb:UpdateItem`.
        item: What of the table it is about, by the kinds of keys: `prediction/status`; else empty.
    """

    function: str
    operation: str
    item: str = ""

    @property
    def reads(self) -> bool:
        """Whether it changes nothing."""
        return self.operation.partition(":")[2].startswith(("Get", "Head", "Query", "List", "Describe", "BatchGet"))

    @property
    def kills(self) -> tuple[Fault, ...]:
        """The ways of dying at it that differ: after a read, a process has left behind what it had before it."""
        return (Fault.KILLED_BEFORE,) if self.reads else KILLS

    def __str__(self) -> str:
        return f"{self.function} {self.operation} {self.item}".rstrip()


@dataclass(frozen=True)
class Strike:
    """A fault that happened.

    Attributes:
        at: When, in Unix seconds.
        call: To which call.
        fault: Which.
        ids: The predictions that the call was about.
    """

    at: float
    call: Call
    fault: Fault
    ids: frozenset[str]

    def __str__(self) -> str:
        return f"{self.call}: {self.fault}"


@dataclass
class _Request:
    method: str
    target: str
    headers: dict[str, str]
    head: bytes
    body: bytes


@dataclass
class AwsProxy:
    """Listens on loopback and passes calls on to the emulator, from `start` to `stop`.

    Attributes:
        upstream: The address of the emulator.
        functions: Access keys to names of functions; what another key signed is passed on and not counted.
        seen: How often each call came.
        strikes: What happened, in order.
        url: Its own address.
    """

    upstream: str
    functions: Mapping[str, str]
    seen: Counter[Call] = field(default_factory=Counter)
    strikes: list[Strike] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aws-proxy")
        self._armed: set[tuple[Call, Fault]] = set()
        self._disarmed: set[tuple[Call, Fault]] = set()
        self._shares: Mapping[Fault, float] = {}
        self._random = random.Random(0)  # noqa: S311  # not for secrets
        self._connections: set[asyncio.Task[None]] = set()

    # -- what is to go wrong ----------------------------------------------------------------------------------

    def arm(self, call: Call, fault: Fault) -> None:
        """Has a fault happen to the next such call."""
        self._armed.add((call, fault))

    def armed(self) -> list[tuple[Call, Fault]]:
        """What is armed and has not happened yet, in a stable order."""
        return sorted(self._armed)

    def disturb(self, shares: Mapping[Fault, float], seed: int = 0) -> None:
        """Has faults happen to some calls at random, from now on; none where `shares` is empty.

        Args:
            shares: What part of all calls each fault happens to.
            seed: Decides which.
        """
        self._random, self._shares = random.Random(seed), dict(shares)  # noqa: S311  # not for secrets

    def calm(self) -> None:
        """Nothing goes wrong from now on."""
        self._armed.clear()
        self._shares = {}

    def about(self, prediction_id: str) -> list[Strike]:
        """What happened to calls about a prediction."""
        return [strike for strike in self.strikes if prediction_id in strike.ids]

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Starts to listen, on a free port."""
        self._thread.start()

        async def listen() -> asyncio.Server:
            return await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_LONGEST_HEAD, backlog=256)

        self._server = asyncio.run_coroutine_threadsafe(listen(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def stop(self) -> None:
        """Closes every connection and ends the thread."""

        async def close() -> None:
            self._server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # -- one connection ---------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one of the two sides is gone, or the proxy stops
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = urlsplit(self.upstream).netloc.split(":")
        behind_reader, behind = await asyncio.open_connection(host, int(port), limit=_LONGEST_HEAD)
        try:
            while request := await _read_request(reader, writer):
                call = self._call(request)
                ids = frozenset(ID.findall(f"{request.target} {request.body[:20_000].decode(errors='replace')}"))
                fault = self._fault(call) if call else None
                pid = await self._caller(writer) if fault in KILLS else None
                if fault in KILLS and pid is None:
                    assert call is not None
                    self._armed |= {(call, fault)} if (call, fault) in self._disarmed else set()
                    return  # it has given this call up meanwhile
                if fault:
                    assert call is not None
                    self.strikes.append(Strike(time.time(), call, fault, ids))
                if fault in (Fault.REFUSED, Fault.THROTTLED):
                    writer.write(_refusal(fault, request))
                    await writer.drain()
                    continue
                if fault is not Fault.KILLED_BEFORE:
                    behind.write(request.head + request.body)
                    await behind.drain()
                    answer = await _read_answer(behind_reader, request.method)
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if pid is not None or fault is Fault.LOST:
                    writer.transport.abort()
                    return
                writer.write(answer)
                await writer.drain()
        finally:
            behind.close()

    def _call(self, request: _Request) -> Call | None:
        signed = _CREDENTIAL.search(request.headers.get("authorization", ""))
        function = self.functions.get(signed[1]) if signed else None
        if not signed or not function:
            return None
        call = Call(function, *_operation(signed[2], request))
        self.seen[call] += 1
        return call

    def _fault(self, call: Call) -> Fault | None:
        for fault in Fault:
            if (call, fault) in self._armed:
                self._armed.discard((call, fault))
                self._disarmed.add((call, fault))
                return fault
        drawn = self._random.random()
        for fault, share in self._shares.items():
            if drawn < share:
                return fault
            drawn -= share
        return None

    async def _caller(self, writer: asyncio.StreamWriter) -> int | None:
        """The process at the other end; None where it has closed the connection."""
        ports = writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1]
        pid = await asyncio.to_thread(process_at, *ports)
        return pid if pid != os.getpid() else None  # its port is this process's by now


@contextlib.contextmanager
def proxied(cloud: LocalCloud) -> Iterator[AwsProxy]:
    """Puts a proxy between the functions of a local cloud and its AWS, for as long as the context lasts."""
    functions = cloud.client("lambda")
    found = {name: functions.get_function_configuration(FunctionName=each) for name, each in cloud.functions.items()}
    keys = {_access_key(configuration): name for name, configuration in found.items()}
    proxy = AwsProxy(cloud.endpoint_url, keys).start()
    try:
        for configuration in found.values():
            variables = {**configuration.get("Environment", {}).get("Variables", {}), "AWS_ENDPOINT_URL": proxy.url}
            functions.update_function_configuration(
                FunctionName=configuration["FunctionName"], Environment={"Variables": variables}
            )
        yield proxy
    finally:
        for configuration in found.values():
            functions.update_function_configuration(
                FunctionName=configuration["FunctionName"],
                Environment={"Variables": configuration.get("Environment", {}).get("Variables", {})},
            )
        proxy.stop()


def _access_key(configuration: Mapping[str, Any]) -> str:
    """The key that the emulator gives a function's role; see its `lambda_runtime.execution_credentials`."""
    made_from = f"{configuration['FunctionArn']}:{configuration['Role']}"
    return f"ASIA{hashlib.sha256(made_from.encode()).hexdigest()[:16].upper()}"


# -- what a call is ---------------------------------------------------------------------------------------------


def _operation(service: str, request: _Request) -> tuple[str, str]:
    if target := request.headers.get("x-amz-target"):
        name = target.rpartition(".")[2]
        return f"{service}:{name}", _item(request.body) if service == "dynamodb" else ""
    if service == "s3":
        asked = dict(parse_qsl(urlsplit(request.target).query, keep_blank_values=True))
        if "uploads" in asked:
            name = "CreateMultipartUpload"
        elif "uploadId" in asked:
            name = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}.get(
                request.method, "ListParts"
            )
        elif "list-type" in asked:
            name = "ListObjectsV2"
        else:
            name = _S3[request.method]
        return f"s3:{name}", ""
    return f"{service}:{request.method}", ""


def _item(body: bytes) -> str:
    """What a call to DynamoDB is about: the kinds of its items, and which of the telling attributes it sets.

    `prediction/status`, `prediction/status(copy_until)`; of a query the index it asks, or the kind of its key.
    """
    asked = json.loads(body)
    if index := asked.get("IndexName"):
        return str(index)
    if "KeyConditionExpression" in asked:
        values = [next(iter(value.values())) for value in asked["ExpressionAttributeValues"].values()]
        return "+".join(sorted({_kind(value) for value in values if isinstance(value, str) and "#" in value}))
    writes = [next(iter(write.values())) for write in asked.get("TransactItems", [])]
    tables = asked.get("RequestItems", {}).values()
    wanted = [key for table in tables if isinstance(table, dict) for key in table.get("Keys", [])]
    keys = [each.get("Key") or each.get("Item") or {} for each in [asked, *writes]] + wanted
    kinds = {f"{_kind(key['pk']['S'])}/{_kind(key['sk']['S'])}" for key in keys if "pk" in key}
    told = [name for name in _TELLING if name in str(asked.get("UpdateExpression"))]
    return "+".join(sorted(kinds)) + (f"({','.join(told)})" if told else "")


def _kind(key: str) -> str:
    # A moment is another one in each run.
    return "moment" if key.isdecimal() else key.partition("#")[0]


# -- HTTP ---------------------------------------------------------------------------------------------------------


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as closed:
        if closed.partial:
            raise
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    return first, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}, head


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Request | None:
    found = await _read_head(reader)
    if found is None:
        return None
    first, headers, head = found
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
    method, target, _ = first.split(" ")
    return _Request(method, target, headers, head, await _read_body(reader, headers))


async def _read_answer(reader: asyncio.StreamReader, method: str) -> bytes:
    while True:
        found = await _read_head(reader)
        if found is None:
            raise EOFError("the emulator has closed the connection")
        first, headers, head = found
        status = int(first.split(" ")[1])
        if status >= 200:
            break
    if method == "HEAD" or status in (204, 304):
        return head
    return head + await _read_body(reader, headers)


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = b""
        while True:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            body += line + await reader.readexactly(size + 2)
            if not size:
                return body
    return await reader.readexactly(int(headers.get("content-length", 0)))


def _refusal(fault: Fault, request: _Request) -> bytes:
    status, code = {
        Fault.REFUSED: ("500 Internal Server Error", "InternalServerError"),
        Fault.THROTTLED: ("400 Bad Request", "ThrottlingException"),
    }[fault]
    if "x-amz-target" in request.headers:
        body = json.dumps({"__type": code, "message": "a fault of the test"}).encode()
    else:
        status = status.replace("400 Bad Request", "503 Slow Down")
        body = f"<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + (
        b"" if request.method == "HEAD" else body
    )


# -- the process at the other end -----------------------------------------------------------------------------------


def process_at(port: int, to: int) -> int | None:
    """Find the process that has a connection from one port of the loopback interface to another.

    Both are needed: a port is used by several processes at once where they are connected to different ones.
    """
    return _process_at_on_linux(port, to) if sys.platform == "linux" else _process_at_by_lsof(port, to)


def _process_at_on_linux(port: int, to: int) -> int | None:
    loopback = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}"
    wanted = [f"{loopback}:{port:04X}", f"{loopback}:{to:04X}"]
    inode = next(
        (
            fields[9]
            for line in Path("/proc/net/tcp").read_text().splitlines()
            if (fields := line.split())[1:3] == wanted
        ),
        None,
    )
    if inode is None or inode == "0":
        return None
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for descriptor in folder.iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) == f"socket:[{inode}]":
                        return int(folder.parent.name)
    return None


def _process_at_by_lsof(port: int, to: int) -> int | None:
    command = ["lsof", "-nP", "-Fpn", f"-iTCP:{port}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours
    pid = None
    for line in ran.stdout.splitlines():
        if line.startswith("p"):
            pid = int(line[1:])
        elif line == f"n127.0.0.1:{port}->127.0.0.1:{to}":
            return pid
    return None

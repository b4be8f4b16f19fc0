"""Copying a file over TLS: CPU and memory, beside what one would write instead.

    python -m tests.benchmarks.copying [--mib 500]

A file host and a stand-in for S3 run in a process of their own, on loopback, with TLS of their own authority; the
stand-in verifies the checksum behind a body. Each round copies the same file three times, one after the other in one
process: by the stack's copier, by urllib3 and boto3's `upload_fileobj`, and by a loop that only reads and sends. CPU is
that of this process; it is compared as a ratio within a run. Memory is that of a new process, above what it takes once
it has copied a small file.
"""

import argparse
import base64
import ctypes
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import parse_headers
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import urllib3
from predictions.files.outputs_bucket import OutputsBucket
from predictions.net.downloads import DownloadClient

from local.terminal import Terminal
from tests.benchmarks.report import BenchmarkFailed, note, table
from tests.support.certificates import certificate_of

MIB = 1024**2
FILE_MIB = 500
ROUNDS = 3
# At most so much of each: what an issue asked for, on the machine where it was measured.
OF_UPLOAD, OF_LOOP = 0.6, 1.9
ALONE_MIB, FOUR_MIB = 32, 64
SIZES_MIB = (50, 500, 2048)
BUCKET = "benchmark.outputs"  # with a dot, so that it is in the path and not in the name of the host
_LOOP_BYTES = 64 * 1024

COPIER, UPLOAD, HASHED, LOOP = "copier", "urllib3 + boto3", "the same, with SHA-256", "read and send"


@dataclass(frozen=True)
class Copied:
    """What copying took.

    Attributes:
        mib: The size of the file of which `cpu` is.
        cpu: Seconds of CPU, by who copied; the least of all rounds.
        memory: Peak in MiB above the idle process, by what was copied.
    """

    mib: int
    cpu: Mapping[str, float]
    memory: Mapping[str, float]

    def ratio(self, other: str) -> float:
        """Return the copier's CPU in that of another."""
        return self.cpu[COPIER] / self.cpu[other]


def measure(say: Callable[[str], None], mib: int = FILE_MIB) -> Copied:
    """Serve, copy, and measure.

    Raises:
        BenchmarkFailed: A copy did not succeed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as stack:
        certificate = certificate_of("localhost", Path(folder))
        files, s3 = (stack.enter_context(_serving(what, certificate)) for what in ("files", "s3"))
        say(f"copying {mib} MiB over TLS, {ROUNDS} rounds of four")
        cpu = _run("cpu", certificate, files, s3, sizes=[mib])["cpu"]
        memory = {}
        for sizes in [*([size] for size in SIZES_MIB), [mib] * 4]:
            name = f"{sizes[0]} MiB" if len(sizes) == 1 else f"{len(sizes)} x {sizes[0]} MiB at once"
            say(f"measuring the memory of copying {name}")
            memory[name] = _run("memory", certificate, files, s3, sizes=sizes)["mib"]
    return Copied(mib, cpu, memory)


def show(terminal: Terminal, copied: Copied) -> None:
    """Show CPU as ratios, and memory."""
    terminal.write()
    terminal.write(
        table(
            ("CPU of copying over TLS", f"s for {copied.mib} MiB", "copier in it", "at most"),
            [
                (COPIER, f"{copied.cpu[COPIER]:.2f}", "", ""),
                (UPLOAD, f"{copied.cpu[UPLOAD]:.2f}", f"{copied.ratio(UPLOAD):.2f} x", f"{OF_UPLOAD} x"),
                (HASHED, f"{copied.cpu[HASHED]:.2f}", f"{copied.ratio(HASHED):.2f} x", f"{OF_UPLOAD} x"),
                (LOOP, f"{copied.cpu[LOOP]:.2f}", f"{copied.ratio(LOOP):.2f} x", f"{OF_LOOP} x"),
            ],
        )
    )
    terminal.write()
    terminal.write(
        table(
            ("memory above the idle process", "MiB", "at most"),
            [
                (name, f"{mib:.1f}", str(FOUR_MIB if "at once" in name else ALONE_MIB))
                for name, mib in copied.memory.items()
            ],
        )
    )
    terminal.write(
        note(
            f"The least of {ROUNDS} rounds, which copy the same file by each in turn. The copier hashes what it passes "
            "on (SHA-256, which the stand-in for S3 verifies) and never overwrites an object; the second row does "
            "neither, the third hashes, and the last one does nothing but read from one connection and write to the "
            f"other, {_LOOP_BYTES // 1024} KiB at a time."
        )
    )


# ---- what is measured


def _run(what: str, certificate: Path, files: int, s3: int, sizes: list[int]) -> dict[str, Any]:
    asked = {"what": what, "files": files, "certificate": str(certificate), "sizes": sizes, "s3": s3}
    ran = subprocess.run(  # noqa: S603  # this module
        [sys.executable, "-m", "tests.benchmarks.copying", "--asked", json.dumps(asked)],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_ENDPOINT_URL_S3": f"https://localhost:{s3}",
            "AWS_CA_BUNDLE": str(certificate),
            "NO_PROXY": "localhost",
        },
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise BenchmarkFailed(f"copying failed:\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


class _Copies:
    """The ways to copy one file, in this process."""

    def __init__(self, files: int, s3: int, certificate: str) -> None:
        self._origin = f"https://localhost:{files}"
        self._ports = files, s3
        self._tls = ssl.create_default_context(cafile=certificate)
        self._bucket = OutputsBucket(
            BUCKET,
            [self._origin],
            open_client=lambda: DownloadClient(allowed_origins=[self._origin], tls=self._tls),
        )
        self._s3 = boto3.client("s3")
        self._http = urllib3.PoolManager(ssl_context=self._tls)

    def copier(self, *sizes: int) -> None:
        """By the stack's own."""
        found = self._bucket.find_files([f"{self._origin}/{size}" for size in sizes])
        stored = self._bucket.store(found, prefix=f"a/{time.monotonic_ns()}", remaining_seconds=lambda: 900)
        assert [file.bytes for file in stored] == list(sizes), stored

    def upload(self, size: int, *, hashed: bool = False) -> None:
        """By what one would write with boto3."""
        response = self._http.request("GET", f"{self._origin}/{size}", preload_content=False)
        body: Any = _Hashing(response) if hashed else response
        self._s3.upload_fileobj(body, BUCKET, "peer")
        response.release_conn()

    def loop(self, size: int) -> None:
        """By nothing but reading and sending."""
        with self._connected(self._ports[0]) as source, self._connected(self._ports[1]) as target:
            source.sendall(b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % size)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += source.recv(1)
            target.sendall(b"PUT /loop HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
            memory = memoryview(bytearray(_LOOP_BYTES))
            left = size
            while left:
                received = source.recv_into(memory)
                target.sendall(memory[:received])
                left -= received
            assert target.recv(1000).startswith(b"HTTP/1.1 200")

    def _connected(self, port: int) -> ssl.SSLSocket:
        return self._tls.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost")


class _Hashing:
    def __init__(self, body: Any) -> None:
        self._body = body
        self._sha256 = hashlib.sha256()

    def read(self, size: int | None = None) -> bytes:
        piece: bytes = self._body.read(size)
        self._sha256.update(piece)
        return piece


def _measure_cpu(copies: _Copies, size: int) -> dict[str, Any]:
    ways: dict[str, Callable[[int], None]] = {
        LOOP: copies.loop,
        COPIER: copies.copier,
        UPLOAD: copies.upload,
        HASHED: lambda size: copies.upload(size, hashed=True),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(MIB)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            way(size)
            took[name].append(time.process_time() - began)
    return {"cpu": {name: min(seconds) for name, seconds in took.items()}}


def _measure_memory(copies: _Copies, sizes: list[int]) -> dict[str, Any]:
    copies.copier(*[MIB] * len(sizes))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
    before = _memory("VmRSS")
    copies.copier(*sizes)
    return {"mib": (_memory("VmHWM") - before) / MIB}


def _memory(name: str) -> int:
    """A figure of this process, in bytes: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html"""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# ---- servers


@contextmanager
def _serving(what: str, certificate: Path) -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    command = [sys.executable, "-m", "tests.benchmarks.copying", "--serve", what, "--certificate", str(certificate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  # this module
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _serve(what: str, certificate: str) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    answer = {"files": _send_files, "s3": _take_objects}[what]
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listening.getsockname()[1], flush=True)  # noqa: T201  # a program's answer

    def serve(connection: socket.socket) -> None:
        with suppress(OSError, EOFError), tls.wrap_socket(connection, server_side=True) as wrapped:
            reader: Any = wrapped.makefile("rb", 256 * 1024)
            while line := reader.readline():
                method, path, _ = line.decode().split(" ", 2)
                answer(wrapped, reader, method, path, parse_headers(reader))

    while True:
        threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()


def _send_files(connection: ssl.SSLSocket, reader: BinaryIO, method: str, path: str, headers: Any) -> None:
    size = int(path[1:])
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: %d\r\n\r\n" % size)
    content = memoryview(bytes(range(256)) * 1024)
    for start in range(0, size, len(content)):
        connection.sendall(content[: size - start])


def _take_objects(connection: ssl.SSLSocket, reader: BinaryIO, method: str, path: str, headers: Any) -> None:
    """As S3: takes everything, keeps nothing, and refuses what does not have the SHA-256 that follows it."""
    if "Expect" in headers:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    status, answer = 404 if method == "HEAD" else 200, b""
    if "Transfer-Encoding" in headers:
        while size := int(reader.readline(), 16):
            _skip(reader, size + 2)
        reader.readline()
    elif headers.get("x-amz-trailer") == "x-amz-checksum-sha256":
        status = 200 if _is_whole(reader, int(headers["x-amz-decoded-content-length"])) else 400
    else:
        _skip(reader, int(headers.get("Content-Length", 0)))
    if method == "POST" and "uploads" in path:
        answer = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    elif method == "POST":
        answer = b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
    head = b'HTTP/1.1 %d OK\r\nETag: "e"\r\nContent-Length: %d\r\n\r\n' % (status, len(answer))
    connection.sendall(head + answer)


def _is_whole(reader: BinaryIO, length: int) -> bool:
    sha256 = hashlib.sha256()
    received = 0
    while size := int(reader.readline(), 16):
        sha256.update(reader.read(size))
        received += size
        reader.readline()
    checksum = reader.readline().strip().partition(b":")[2]
    reader.readline()
    return received == length and checksum == base64.b64encode(sha256.digest())


def _skip(reader: BinaryIO, size: int) -> None:
    while size:
        skipped = len(reader.read(min(size, 256 * 1024)))
        if not skipped:
            raise EOFError
        size -= skipped


def main() -> int:
    """Run this part alone, or what a part of it needs; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure copying over TLS.")
    parser.add_argument("--mib", type=int, default=FILE_MIB, help="size of the file")
    for internal in ("--serve", "--certificate", "--asked"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve, options.certificate)
    if options.asked:
        asked = json.loads(options.asked)
        copies = _Copies(asked["files"], asked["s3"], asked["certificate"])
        sizes = [size * MIB for size in asked["sizes"]]
        found = _measure_cpu(copies, sizes[0]) if asked["what"] == "cpu" else _measure_memory(copies, sizes)
        print(json.dumps(found))  # noqa: T201  # a program's answer
        return 0
    terminal = Terminal(sys.stdout)
    try:
        show(terminal, measure(terminal.step, options.mib))
    except BenchmarkFailed as error:
        terminal.refuse(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

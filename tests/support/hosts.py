"""Servers on this machine: one that answers as it likes, and one that stands for S3 and keeps nothing."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[socket.socket], None]

ENDED = threading.Event()
"""Never set: what waits for it with a timeout sleeps, and nobody has to."""


class HostileHost:
    """Answers each path as the test says, byte by byte; `asked` has the head of each request.

    Args:
        answers: What to do with a connection on which a path was asked for; the path may be without its query.
        address: Where to listen.
    """

    def __init__(self, answers: Mapping[str, Answer], address: str = "127.0.0.1") -> None:
        self.answers = answers
        self.asked: list[bytes] = []
        self.connections = 0
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, 0), family=family, backlog=64)
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def port(self) -> int:
        port: int = self._listening.getsockname()[1]
        return port

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends all connections, and waits until nobody is at work any more."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listening.close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = self._listening.accept()[0]
                self.connections += 1
                self._open.add(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        # The other side has had enough, or the test is over: that is what is tested.
        with suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(65536)
                if not piece:
                    return
                head += piece
            self.asked.append(head)
            target = head.split(b" ")[1].decode("latin-1")
            answer = self.answers.get(target) or self.answers.get(target.partition("?")[0]) or self.answers[""]
            answer(connection)
            connection.shutdown(socket.SHUT_RDWR)
        self._open.discard(connection)


@contextmanager
def hostile_host(answers: Mapping[str, Answer]) -> Iterator[HostileHost]:
    """A `HostileHost` that ends with the block."""
    host = HostileHost(answers)
    try:
        yield host
    finally:
        host.close()


def sends(*pieces: bytes) -> Answer:
    """Sends bytes, then hangs up."""

    def answer(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return answer


def head(*lines: str, status: str = "200 OK") -> bytes:
    """The head of an answer."""
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def whole(body: bytes, content_type: str = "image/png", *lines: str) -> bytes:
    """An answer with nothing wrong in its lengths."""
    return head(f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *lines) + body


def endless(piece: bytes, *, start: bytes, every: float = 0.0) -> Answer:
    """Begins like this, and then sends the same again and again, at most until the other side goes."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            if every:
                ENDED.wait(every)

    return answer


def silent(start: bytes = b"") -> Answer:
    """Begins, and says no more until the other side goes."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        connection.recv(1)

    return answer


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._answer(404)

    def do_DELETE(self) -> None:
        self._answer(204)

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 65536)))
        self._answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if "uploads" in self.path:
            self._answer(200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        else:
            self._answer(200, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")


@contextmanager
def sink() -> Iterator[str]:
    """An S3 that takes everything and keeps nothing; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

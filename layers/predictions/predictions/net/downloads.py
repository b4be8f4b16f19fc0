"""Downloads from untrusted hosts: behind the guard of `net.client`, for files of any size.

h11 reads the head of each response, as strictly as for httpx, and bodies in chunks or without a length. A body whose
length is announced needs no parser: it is read from the connection as it is. httpx and its parser take three times the
CPU that TLS itself takes for each 16 KiB.
"""

import math
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import h11
import httpcore
import httpx

from predictions.errors import PredictionsError
from predictions.net.addresses import AddressRefused
from predictions.net.client import CheckedNetwork, TimedNetwork, TimedStream, origin_of, resolve_name, usual_authorities

_READ_BYTES = 64 * 1024
_PIECE_BYTES = 256 * 1024
# A head, or the size of a chunk with its extensions, beyond this is refused: httpcore's own limit.
_HEAD_MAX_BYTES = 100 * 1024
_IDLE_SECONDS = 5.0


class DownloadFailed(PredictionsError):
    """The connection to the host failed; the message is the kind of failure, such as `ReadTimeout`."""


class UrlInvalid(PredictionsError):
    """A URL cannot be read."""


class DownloadClient:
    """Opens responses to GET, from several threads; connections that are left in order are used again.

    As `net.client.guarded_client`: only public addresses over TLS, certificates checked against the name, no redirect
    followed, nothing kept of one response for the next, nothing taken from the environment.

    Args:
        allowed_origins: `scheme://host[:port]` for which neither scheme nor address is checked.
        left: How many seconds the calling thread has in all; each step is limited by it.
        timeout: Seconds for each step: the connection, and each piece of a response.
        resolve: Gives a name's addresses; raises `OSError`.
        network: Opens the connection to an address.
        tls: Other certificate authorities than the usual ones.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        *,
        allowed_origins: Collection[str] = (),
        left: Callable[[], float] = lambda: math.inf,
        timeout: float = 15.0,
        resolve: Callable[[str, int], Sequence[str]] = resolve_name,
        network: httpcore.NetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed_origins = frozenset(origin_of(httpx.URL(origin)) for origin in allowed_origins)
        self._timeout = timeout
        network = network or httpcore.SyncBackend()
        self._open_network = TimedNetwork(left, network)
        self._guarded_network = TimedNetwork(left, CheckedNetwork(resolve, network))
        self._tls = tls
        self._clock = clock
        # By origin: a connection that was opened without a check is never used for another one.
        self._idle: dict[str, list[tuple[TimedStream, float]]] = defaultdict(list)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            idle = [stream for streams in self._idle.values() for stream, _ in streams]
            self._idle.clear()
        stream: TimedStream
        for stream in idle:
            stream.close()

    def open(self, url: str, headers: Mapping[str, str]) -> "Download":
        """Ask for a URL, and read the head of the response.

        Returns:
            The response, to be closed by its user as a context manager.

        Raises:
            UrlInvalid: The URL cannot be read.
            AddressRefused: The guard holds the request back.
            DownloadFailed: There was no response.
        """
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            raise UrlInvalid from None
        origin = origin_of(target)
        with _failures():
            stream = self._used_before(origin) or self._connect(target, origin)
            try:
                return self._ask(stream, target, origin, headers)
            except BaseException:
                stream.close()
                raise

    def _used_before(self, origin: str) -> TimedStream | None:
        while True:
            with self._lock:
                if not self._idle[origin]:
                    return None
                stream, until = self._idle[origin].pop()
            # Readable: the host hung up, or sends what nobody asked for.
            if self._clock() < until and not stream.get_extra_info("is_readable"):
                return stream
            stream.close()

    def _connect(self, target: httpx.URL, origin: str) -> TimedStream:
        if origin in self._allowed_origins:
            network = self._open_network
        elif target.scheme == "https":
            network = self._guarded_network
        else:
            raise AddressRefused("must start with https://")
        host = target.raw_host.decode("ascii")
        port = target.port or (443 if target.scheme == "https" else 80)
        stream = network.connect_tcp(host, port, self._timeout)
        assert isinstance(stream, TimedStream)
        if target.scheme != "https":
            return stream
        try:
            return stream.start_tls(self._tls or usual_authorities(), host, self._timeout)
        except BaseException:
            stream.close()
            raise

    def _ask(self, stream: TimedStream, target: httpx.URL, origin: str, headers: Mapping[str, str]) -> "Download":
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_MAX_BYTES)
        asked = {"Host": target.netloc.decode("ascii"), "Accept": "*/*", **headers}
        request = h11.Request(method="GET", target=target.raw_path, headers=list(asked.items()))
        head = (parser.send(request) or b"") + (parser.send(h11.EndOfMessage()) or b"")
        stream.write(head, self._timeout)

        def close(reusable: bool) -> None:
            if not reusable:
                stream.close()
                return
            with self._lock:
                self._idle[origin].append((stream, self._clock() + _IDLE_SECONDS))

        while True:
            event = _next_event(parser, stream, self._timeout)
            if isinstance(event, h11.Response):
                return Download(target, event, parser, stream, self._timeout, close)
            if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
                raise h11.RemoteProtocolError("the host switched protocols or sent no response")


class Download:
    """A response whose body is read piece by piece.

    Attributes:
        status: Its status.
        headers: Its headers.
        length: The bytes of its body, if the head says so and nothing else ends the body; None otherwise.
    """

    def __init__(
        self,
        url: httpx.URL,
        head: h11.Response,
        parser: h11.Connection,
        stream: TimedStream,
        timeout: float,
        close: Callable[[bool], None],
    ) -> None:
        self.status = head.status_code
        self.headers = httpx.Headers(head.headers.raw_items())
        self._url = url
        self._parser = parser
        self._stream = stream
        self._timeout = timeout
        self._close = close
        # h11 has refused a length that is no number, and several that differ; two that agree are one for it.
        announced = dict(head.headers).get(b"content-length")
        bare = self.status == 200 and b"transfer-encoding" not in dict(head.headers)
        self.length = int(announced) if announced is not None and bare else None
        self._left = self.length
        # Of a short body the parser may have it all, and more than that.
        self._ahead = memoryview(b"" if self.length is None else parser.trailing_data[0])
        self._piece = memoryview(bytearray(min(_PIECE_BYTES, self.length or 0)))
        tokens = {token.strip().lower() for token in self.headers.get("Connection", "").split(",")}
        self._persistent = head.http_version == b"1.1" and "close" not in tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close(self._persistent and self._over())

    def read(self, size: int) -> memoryview:
        """Read some bytes, as they come: at least one and at most `size`; none at the end of the body.

        Returns:
            Memory that the next call overwrites.

        Raises:
            DownloadFailed: The connection broke off, or the host was silent.
        """
        with _failures():
            if self._left is None:
                return self._read_framed(size)
            piece = self._take(min(size, self._left)) if self._ahead else self._receive(min(size, self._left))
            self._left -= len(piece)
            return piece

    def _take(self, size: int) -> memoryview:
        piece, self._ahead = self._ahead[:size], self._ahead[size:]
        return piece

    def _receive(self, size: int) -> memoryview:
        if not size:
            return self._piece[:0]
        piece = self._piece[:size]
        received = self._stream.fill(piece, self._timeout)
        if not received:
            raise h11.RemoteProtocolError("the host hung up")
        return piece[:received]

    def redirect(self) -> str:
        """Return the URL that the response redirects to.

        Raises:
            UrlInvalid: It cannot be read.
        """
        try:
            return str(self._url.join(self.headers.get("Location", "")))
        except httpx.InvalidURL:
            raise UrlInvalid from None

    def _read_framed(self, size: int) -> memoryview:
        if not self._ahead:
            event = _next_event(self._parser, self._stream, self._timeout)
            if isinstance(event, h11.Data):
                self._ahead = memoryview(event.data)
        return self._take(size)

    def _over(self) -> bool:
        if self._left is not None:
            return not self._left and not self._ahead
        return self._parser.their_state is h11.DONE and not self._parser.trailing_data[0]


def _next_event(parser: h11.Connection, stream: TimedStream, timeout: float) -> h11.Event | type[h11.PAUSED]:
    while (event := parser.next_event()) is h11.NEED_DATA:
        received = stream.read(_READ_BYTES, timeout)
        if not received and parser.their_state is h11.SEND_RESPONSE:
            raise h11.RemoteProtocolError("the host hung up without a response")
        parser.receive_data(received)
    return event  # type: ignore[return-value]  # all but the one above


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (h11.ProtocolError, httpcore.TimeoutException, httpcore.NetworkError) as error:
        raise DownloadFailed(type(error).__name__) from error

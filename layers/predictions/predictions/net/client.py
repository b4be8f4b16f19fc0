"""HTTP clients for untrusted hosts, and helpers that all HTTP clients share.

guarded_client   a client that only talks to public addresses, over TLS (for files: `net.downloads`)
TimedNetwork     a network in which the time for everything together ends
CheckedNetwork   a network of public addresses only
read_up_to       a body, or the beginning of one that is too large
run_in_time      a call that nothing may keep from ending in time
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpcore
import httpx

from predictions.net.addresses import AddressRefused, is_public

Result = TypeVar("Result")


def read_up_to(
    chunks: Iterable[bytes], limit_bytes: int, check: Callable[[], None] = lambda: None
) -> tuple[bytes, bool]:
    """Read a body up to a limit.

    Args:
        chunks: `response.iter_bytes()`, or `iter_raw()` for a body as it was sent.
        limit_bytes: The most bytes that are wanted.
        check: Called after each chunk; raises where the time is over.

    Returns:
        The body, and whether it is longer than the limit: then only its beginning was read.
    """
    received = bytearray()
    for chunk in chunks:
        received += chunk
        if len(received) > limit_bytes:
            return bytes(received), True
        check()
    return bytes(received), False


def run_in_time(call: Callable[[], Result], seconds: float) -> Result:
    """Run a call in a thread of its own, and wait for its result a limited time.

    A call that takes longer ends by itself later; its result is discarded.

    Raises:
        TimeoutError: It took longer.
        Exception: What the call raised.
    """
    found: list[Result] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:  # noqa: BLE001  # raised again below, in the thread that waits
            failed.append(error)

    # Daemon: a process that ends does not wait for it.
    thread: threading.Thread = threading.Thread(target=run, name="run_in_time", daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError("the time is over")
    return found[0]


def resolve_name(host: str, port: int) -> list[str]:
    """Resolve a name to all its IP addresses, in the system's order.

    Raises:
        OSError: The name does not resolve (`socket.gaierror`).
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _resolve_in_time(
    resolve: Callable[[str, int], Sequence[str]], host: str, port: int, timeout: float | None
) -> Sequence[str]:
    """Resolve a name within a time limit.

    The system's resolver takes no timeout: tens of seconds where a name server is silent.

    Raises:
        httpcore.ConnectTimeout: The name was not resolved in time.
        OSError: The name does not resolve.
    """
    if timeout is None:
        return resolve(host, port)
    try:
        return run_in_time(lambda: resolve(host, port), timeout)
    except TimeoutError as error:
        raise httpcore.ConnectTimeout("the name was not resolved in time") from error


@cache
def usual_authorities() -> ssl.SSLContext:
    """Return the context that checks certificates against the usual authorities.

    One for each process: reading them takes ten milliseconds.
    """
    return httpx.create_ssl_context(trust_env=False)


def guarded_client(
    *,
    allowed_origins: Collection[str] = (),
    resolve: Callable[[str, int], Sequence[str]] = resolve_name,
    network: httpcore.NetworkBackend | None = None,
    verify: ssl.SSLContext | None = None,
    **httpx_kwargs: Any,
) -> httpx.Client:
    """Create an HTTP client that only connects to public addresses, over TLS.

    Of a name's addresses those that are not public are passed over; the others are dialled in order, as IP
    addresses, so nothing is looked up between check and connection. The certificate is checked against the
    name. Redirects are not followed, no cookie is kept, nothing is taken from the environment (proxies,
    netrc, certificates). The client may be used from several threads.

    Args:
        allowed_origins: `scheme://host[:port]` for which neither scheme nor address is checked.
        resolve: Gives a name's addresses; raises `OSError`. Its time counts against the connect timeout.
        network: Opens the connection to an address.
        verify: Other certificate authorities than the usual ones; a check there always is.
        **httpx_kwargs: As for `httpx.Client`, such as `timeout`, `headers` and `event_hooks`; what would go
            around the guard (`transport`, `mounts`, `proxy`, `trust_env`, `follow_redirects`, `cookies`) is a
            `TypeError`.

    Returns:
        A client, to be closed by its user. A request raises `AddressRefused` where the guard holds it back,
        and httpx's own errors otherwise.
    """
    network = network or httpcore.SyncBackend()
    transport = _GuardedTransport(
        frozenset(origin_of(httpx.URL(origin)) for origin in allowed_origins),
        CheckedNetwork(resolve, network),
        network,
        httpx.create_ssl_context(verify=verify or True, trust_env=False),
    )
    return httpx.Client(
        transport=transport,
        mounts=None,
        proxy=None,
        trust_env=False,
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        **httpx_kwargs,
    )


class TimedNetwork(httpcore.NetworkBackend):
    """A network with a total time limit: per-step timeouts do not stop a slow server.

    Args:
        left: How many seconds are left to the calling thread; from zero down every step fails.
        network: Opens the connections.
    """

    def __init__(self, left: Callable[[], float], network: httpcore.NetworkBackend | None = None) -> None:
        self._left = left
        self._network = network or httpcore.SyncBackend()

    def limited(self, timeout: float | None) -> float:
        """Return how long one step may take.

        Raises:
            httpcore.ReadTimeout: No time is left.
        """
        left = self._left()
        if left <= 0:
            raise httpcore.ReadTimeout("the time is over")
        return left if timeout is None else min(left, timeout)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Open a connection on which each step is limited too."""
        stream = self._network.connect_tcp(host, port, self.limited(timeout), local_address, socket_options)
        return TimedStream(stream, self)


class TimedStream(httpcore.NetworkStream):
    """A connection of a `TimedNetwork`."""

    def __init__(self, stream: httpcore.NetworkStream, network: TimedNetwork) -> None:
        self._stream = stream
        self._network = network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Receive at most so many bytes; none at the end."""
        return self._stream.read(max_bytes, self._network.limited(timeout))

    def fill(self, buffer: memoryview, timeout: float | None = None) -> int:
        """Receive what is there, and wait for the first byte of it only.

        One call for many records of TLS, which arrive 16 KiB at a time: asking for each through all layers costs half
        of what decrypting them does.

        Returns:
            The bytes that were received; 0 at the end.

        Raises:
            httpcore.ReadTimeout: None arrived in time.
            httpcore.ReadError: The connection broke off.
        """
        connection: socket.socket = self._stream.get_extra_info("socket")
        try:
            connection.settimeout(self._network.limited(timeout))
            received = connection.recv_into(buffer)
            connection.settimeout(0)
            with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while 0 < received < len(buffer):
                    more = connection.recv_into(buffer[received:])
                    if not more:
                        break
                    received += more
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it, each piece within the time that is left."""
        for start in range(0, len(buffer), 65536):
            self._stream.write(buffer[start : start + 65536], self._network.limited(timeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "TimedStream":
        """Return the connection with TLS on it."""
        stream = self._stream.start_tls(ssl_context, server_hostname, self._network.limited(timeout))
        return TimedStream(stream, self._network)

    def get_extra_info(self, info: str) -> Any:
        """Return a fact of the connection, as httpcore names it."""
        return self._stream.get_extra_info(info)


def origin_of(url: httpx.URL) -> str:
    """Return `scheme://host:port` of a URL."""
    port = {"http": 80, "https": 443}.get(url.scheme) if url.port is None else url.port
    return f"{url.scheme}://{url.host}:{port}"


class CheckedNetwork(httpcore.NetworkBackend):
    """Opens connections to public addresses only, after looking the name up itself."""

    def __init__(self, resolve: Callable[[str, int], Sequence[str]], network: httpcore.NetworkBackend) -> None:
        self._resolve = resolve
        self._network = network

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Open a connection to the first public address that takes it.

        Raises:
            AddressRefused: The name has no public address.
        """
        # The timeout covers the lookup and the connection, and so does the whole time of a `TimedNetwork`.
        if isinstance(self._network, TimedNetwork):
            timeout = self._network.limited(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        try:
            addresses = _resolve_in_time(self._resolve, host, port, timeout)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name does not resolve: {error}") from error
        public = [address for address in addresses if is_public(address)]
        if not public:
            raise AddressRefused("leads to a private or reserved address")
        # The addresses share what is left, and a silent one leaves some to the next.
        for left in range(len(public), 0, -1):
            share = None if end is None else max(0.01, end - time.monotonic()) / left
            try:
                return self._network.connect_tcp(public[-left], port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if left == 1:
                    raise
        raise AssertionError("the last address either connects or raises")


class _GuardedTransport(httpx.BaseTransport):
    """httpx's transport over httpcore's public interface.

    Replacing the private pool of `httpx.HTTPTransport` would be shorter, and would open the guard silently on
    the day httpx renames it.
    """

    def __init__(
        self,
        allowed_origins: frozenset[str],
        checked: CheckedNetwork,
        network: httpcore.NetworkBackend,
        tls: ssl.SSLContext,
    ) -> None:
        def pool(network: httpcore.NetworkBackend) -> httpcore.ConnectionPool:
            return httpcore.ConnectionPool(
                ssl_context=tls, max_connections=16, keepalive_expiry=5, network_backend=network
            )

        self._allowed_origins = allowed_origins
        self._guarded = pool(checked)
        # A pool of its own: a connection that was opened without a check is never reused for another origin.
        self._open = pool(network)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if origin_of(request.url) in self._allowed_origins:
            pool = self._open
        elif request.url.scheme == "https":
            pool = self._guarded
        else:
            raise AddressRefused("must start with https://")
        # `sni_hostname` would have the certificate checked against another name than the URL's.
        extensions = {name: value for name, value in request.extensions.items() if name != "sni_hostname"}
        response = exchange(pool, request, extensions)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=ResponseStream(response),
            extensions=response.extensions,
        )

    def close(self) -> None:
        self._guarded.close()
        self._open.close()


def exchange(pool: httpcore.ConnectionPool, request: httpx.Request, extensions: Mapping[str, Any]) -> httpcore.Response:
    """Send httpx's request through httpcore's pool, with other extensions."""
    if not isinstance(request.stream, httpx.SyncByteStream):
        raise TypeError("requests are sent synchronously only")
    with _httpx_errors():
        return pool.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=dict(extensions),
            )
        )


class ResponseStream(httpx.SyncByteStream):
    """The body of httpcore's response, as httpx reads it.

    Args:
        closed: Called once it is closed.
    """

    def __init__(self, response: httpcore.Response, closed: Callable[[], None] = lambda: None) -> None:
        self._response = response
        self._closed = closed

    def __iter__(self) -> Iterator[bytes]:
        with _httpx_errors():
            yield from self._response.iter_stream()

    def close(self) -> None:
        """Close the response, and then what it came from."""
        try:
            with _httpx_errors():
                self._response.close()
        finally:
            self._closed()


@contextmanager
def _httpx_errors() -> Iterator[None]:
    """Raise httpcore's errors as those of httpx, which have the same names."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
        kind: type[httpx.TransportError] = getattr(httpx, type(error).__name__)
        raise kind(str(error)) from error

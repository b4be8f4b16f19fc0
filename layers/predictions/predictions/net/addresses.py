"""Which network addresses may be talked to when a stranger chose the URL.

Two doors, both needed: `check_webhook_url` refuses a bad URL early, where its author still gets a clear
answer, and `guarded_client` decides where the socket is opened. Only the second one is safe against names
that resolve to a private address, or to another address a moment later (DNS rebinding): it looks the name up
itself and dials exactly the address that it checked.
"""

import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpcore
import httpx

from predictions.errors import PredictionsError

WEBHOOK_URL_MAX_LENGTH = 2048

# https://www.iana.org/assignments/iana-ipv4-special-registry
# https://www.iana.org/assignments/iana-ipv6-special-registry
# Written out, because `ipaddress.is_global` has changed its answers between Python releases.
_SPECIAL_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier NAT; AWS uses it inside its networks
        "127.0.0.0/8",  # loopback; the Lambda runtime's own API is here
        "169.254.0.0/16",  # link-local; the metadata services of EC2 and ECS are here
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Global unicast is 2000::/3 and nothing else. So loopback, IPv4-mapped, NAT64 (64:ff9b::/96), unique local
# (with EC2's metadata at fd00:ec2::254), link-local and multicast addresses are refused without being named.
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries an IPv4 address
        "3fff::/20",  # documentation
    )
)

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]@]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_NAME = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z0-9-]{1,63}")
# The test by which a WHATWG URL parser takes a host for an IPv4 address: 0x7f.1, 017700000001, 2130706433 …
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_PRIVATE_NAMES = ("localhost", "localdomain", "local", "internal", "intranet", "lan", "home.arpa")


class AddressRefused(PredictionsError):
    """A URL is not to be contacted; the message (`must start with https://`) may be shown to anyone."""


def is_public(address: str) -> bool:
    """Whether an IP address, in its usual notation, belongs to the public Internet.

    Everything of the special-purpose registries is not public, nor are IPv6 addresses that carry an IPv4
    address: what those lead to depends on a gateway. What is no IP address is not public either.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_IPV4)
    # A scope (`%eth0`) names an interface of this machine.
    return ip.scope_id is None and ip in _GLOBAL_IPV6 and not any(ip in network for network in _SPECIAL_IPV6)


def check_webhook_url(url: str, *, allow_loopback: bool) -> None:
    """Refuses a webhook URL that can be seen to be unusable, without looking any name up.

    Ports are 443 and everything from 1024: webhooks on 8443 are usual, while the other low ports are services
    (SSH, SMTP, …) that a signed request has no business with.

    Args:
        url: What the caller gave.
        allow_loopback: Also allow `http` and `https` to `127.0.0.1` and `localhost`, any port (local cloud).

    Raises:
        AddressRefused: With the reason, which never repeats the URL.
    """
    if len(url) > WEBHOOK_URL_MAX_LENGTH:
        raise AddressRefused(f"is longer than {WEBHOOK_URL_MAX_LENGTH} characters")
    # Parsers disagree about everything else: what remains is read the same way by all of them.
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise AddressRefused(
            "may only hold printable ASCII characters, no spaces and no backslash: percent-encode the path, "
            "and write an international name as xn--…"
        )
    if "#" in url:
        raise AddressRefused("must not have a fragment (#…)")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise AddressRefused("is not a valid URL") from None
    if parts.scheme not in ("https", "http") or not url[len(parts.scheme) :].startswith("://"):
        raise AddressRefused("must start with https://")
    if "@" in parts.netloc:
        raise AddressRefused("must not contain a user name or password")
    authority = _AUTHORITY.fullmatch(parts.netloc)
    if authority is None:
        raise AddressRefused("needs a host name, and after it at most a port in digits")
    host = authority[1].lower()
    port = int(authority[2]) if authority[2] else None
    if port is not None and not 1 <= port <= 65535:
        raise AddressRefused("has a port outside 1 to 65535")

    if allow_loopback and host in ("127.0.0.1", "localhost"):
        return
    if parts.scheme != "https":
        raise AddressRefused("must start with https://")
    _check_host(host)
    if port is not None and port != 443 and port < 1024:
        raise AddressRefused("may only use port 443 or a port from 1024")


def _check_host(host: str) -> None:
    if host.startswith("["):
        if not is_public(host[1:-1]):
            raise AddressRefused("must not lead to a private or reserved address")
    elif _ENDS_IN_A_NUMBER.fullmatch(host):
        # Only the canonical notation passes: whatever ipaddress does not read is not public.
        if not is_public(host):
            raise AddressRefused("must not lead to a private or reserved address, in whatever notation")
    elif any(host == name or host.endswith(f".{name}") for name in _PRIVATE_NAMES):
        raise AddressRefused("must not lead to a name of a private network")
    elif "." not in host:
        raise AddressRefused("needs a full host name, such as hooks.example.com")
    elif not _NAME.fullmatch(host):
        raise AddressRefused("does not have a valid host name")


def _resolve(host: str, port: int) -> list[str]:
    """All IP addresses of a name, in the order in which the system would try them.

    Raises:
        OSError: The name does not resolve (`socket.gaierror`).
    """
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


def _resolve_in_time(
    resolve: Callable[[str, int], Sequence[str]], host: str, port: int, timeout: float | None
) -> Sequence[str]:
    """Resolve a name within a time limit.

    The system's resolver takes no timeout (tens of seconds where a name server is silent), so the lookup runs in a
    thread of its own. A lookup that is given up ends by itself later; its result is discarded.

    Raises:
        httpcore.ConnectTimeout: The name was not resolved in time.
        OSError: The name does not resolve.
    """
    if timeout is None:
        return resolve(host, port)
    found: list[Sequence[str]] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            found.append(resolve(host, port))
        except Exception as error:  # noqa: BLE001  # raised again below, in the thread that waits
            failed.append(error)

    # Daemon: a process that ends does not wait for a silent name server.
    thread = threading.Thread(target=look_up, name="resolve", daemon=True)
    thread.start()
    thread.join(min(timeout, threading.TIMEOUT_MAX))
    if failed:
        raise failed[0]
    if not found:
        raise httpcore.ConnectTimeout("the name was not resolved in time")
    return found[0]


def guarded_client(
    *,
    allowed_origins: Collection[str] = (),
    resolve: Callable[[str, int], Sequence[str]] = _resolve,
    network: httpcore.NetworkBackend | None = None,
    verify: ssl.SSLContext | None = None,
    **httpx_kwargs: Any,
) -> httpx.Client:
    """An HTTP client that only ever talks to public addresses, over TLS.

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
        frozenset(_origin(httpx.URL(origin)) for origin in allowed_origins),
        _CheckedNetwork(resolve, network),
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
    """A network in which time ends: a server that sends a byte a second keeps every timeout, and lasts for ever.

    Args:
        left: How many seconds are left to whoever asks, in the thread that asks; from zero down every step fails.
    """

    def __init__(self, left: Callable[[], float]) -> None:
        self._left = left
        self._network = httpcore.SyncBackend()

    def limited(self, timeout: float | None) -> float:
        """How long one step may take.

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
        """A connection on which each step is limited too."""
        stream = self._network.connect_tcp(host, port, self.limited(timeout), local_address, socket_options)
        return _TimedStream(stream, self)


class _TimedStream(httpcore.NetworkStream):
    """A connection of a `TimedNetwork`."""

    def __init__(self, stream: httpcore.NetworkStream, network: TimedNetwork) -> None:
        self._stream = stream
        self._network = network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._network.limited(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), 65536):
            self._stream.write(buffer[start : start + 65536], self._network.limited(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._network.limited(timeout))
        return _TimedStream(stream, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _origin(url: httpx.URL) -> str:
    port = {"http": 80, "https": 443}.get(url.scheme) if url.port is None else url.port
    return f"{url.scheme}://{url.host}:{port}"


class _CheckedNetwork(httpcore.NetworkBackend):
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
        checked: _CheckedNetwork,
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
        if _origin(request.url) in self._allowed_origins:
            pool = self._open
        elif request.url.scheme == "https":
            pool = self._guarded
        else:
            raise AddressRefused("must start with https://")
        if not isinstance(request.stream, httpx.SyncByteStream):
            raise TypeError("a guarded client sends synchronous requests only")
        with _httpx_errors():
            response = pool.handle_request(
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
                    extensions=_without_unchecked_name(request.extensions),
                )
            )
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Stream(response),
            extensions=response.extensions,
        )

    def close(self) -> None:
        self._guarded.close()
        self._open.close()


def _without_unchecked_name(extensions: Mapping[str, Any]) -> dict[str, Any]:
    # `sni_hostname` would have the certificate checked against another name than the URL's.
    return {name: value for name, value in extensions.items() if name != "sni_hostname"}


class _Stream(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _httpx_errors():
            yield from self._response.iter_stream()

    def close(self) -> None:
        with _httpx_errors():
            self._response.close()


@contextmanager
def _httpx_errors() -> Iterator[None]:
    """Turns httpcore's errors into httpx's, which have the same names."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
        kind: type[httpx.TransportError] = getattr(httpx, type(error).__name__)
        raise kind(str(error)) from error

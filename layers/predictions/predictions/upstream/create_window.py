"""The time window of a create, and the connection that keeps to it.

A claim is a lease: `submit_until` in the item says until when its holder may act. Readers of Replicate's list rely on
it, so it has to hold without the holder's cooperation. A function that is frozen between its claim and its POST, and
thawed minutes later, must not send anything then; nor may its kernel send what was left in a socket's buffer.

    before the first byte   the window is checked after connection and TLS, immediately before the request is written
    while it goes on        one limit of wall-clock time covers connection, TLS, request and response together
    afterwards              SO_LINGER (1, 0) makes any close, also that of a killed process, a reset (RST), which
                            discards what was not sent yet: https://man7.org/linux/man-pages/man7/socket.7.html

A connection is used for one create only. A pooled one could fail because of its age, after part of a request was sent.
"""

import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpcore
import httpx

from predictions.net.client import ResponseStream, TimedNetwork, exchange, usual_authorities

_RESET_WHEN_CLOSED: httpcore.SOCKET_OPTION = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

_WITHOUT_WINDOW_SECONDS = 3600.0


class CreateTooLateError(httpx.ConnectTimeout):
    """The window for the first byte has closed: nothing was sent."""


@dataclass(frozen=True)
class SendWindow:
    """When one create may be sent.

    Attributes:
        first_byte_until: No byte of the request is written after this moment, in seconds since 1970.
        over_at: By this moment the create is over, with or without a response.
        now: The time, in seconds since 1970.
    """

    first_byte_until: float
    over_at: float
    now: Callable[[], float] = field(repr=False, compare=False)

    def check(self) -> None:
        """Refuse to begin after the window.

        Raises:
            CreateTooLateError: The window has closed.
        """
        late = self.now() - self.first_byte_until
        if late > 0:
            raise CreateTooLateError(f"the create was to be sent {late:.1f} s ago; nothing was sent")


def single_use_client(**options: Any) -> httpx.Client:
    """Create a client with one connection for each request, bound to its `SendWindow`.

    Args:
        **options: As for `httpx.Client`, such as `timeout` and `headers`.
    """
    return httpx.Client(transport=SingleUseTransport(), follow_redirects=False, trust_env=False, **options)


class SingleUseTransport(httpx.BaseTransport):
    """Sends each request over a new connection, within its `SendWindow`."""

    def __init__(self, verify: ssl.SSLContext | None = None) -> None:
        # Made with the first create: most invocations need none.
        self._tls = verify

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request, within the window in its extensions, if any."""
        if self._tls is None:
            self._tls = usual_authorities()
        window = request.extensions.get("window")
        pool = httpcore.ConnectionPool(
            ssl_context=self._tls,
            max_connections=1,
            max_keepalive_connections=0,
            network_backend=_WindowedNetwork(window),
        )
        try:
            response = exchange(pool, request, {"timeout": request.extensions.get("timeout", {})})
        except BaseException:
            pool.close()
            raise
        return httpx.Response(response.status, headers=response.headers, stream=ResponseStream(response, pool.close))


class _WindowedNetwork(TimedNetwork):
    """Opens connections that check the window before they write, and close by reset."""

    def __init__(self, window: SendWindow | None) -> None:
        self._window = window
        if window is None:
            super().__init__(lambda: _WITHOUT_WINDOW_SECONDS)
            return
        # Both clocks count: the one that is set back when a sandbox thaws, and the one that is stopped meanwhile.
        until = time.monotonic() + window.over_at - window.now()
        super().__init__(lambda: min(until - time.monotonic(), window.over_at - window.now()))

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        if self._window is not None:
            self._window.check()
        options = [*(socket_options or ()), _RESET_WHEN_CLOSED]
        stream = super().connect_tcp(host, port, timeout, local_address, options)
        return _WindowedStream(stream, self._window)


class _WindowedStream(httpcore.NetworkStream):
    """A connection whose first write of application data checks the window."""

    def __init__(self, stream: httpcore.NetworkStream, window: SendWindow | None) -> None:
        self._stream = stream
        self._window = window
        self._began = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not self._began and self._window is not None:
            self._window.check()
        self._began = True
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _WindowedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._window)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

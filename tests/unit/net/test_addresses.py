import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from predictions.net.addresses import AddressRefused, check_webhook_url
from predictions.net.client import TimedNetwork, guarded_client

from tests.support.certificates import certificate_of

PUBLIC = "93.184.215.14"

LOOPBACK_URLS = [
    "http://127.0.0.1/",
    "http://127.0.0.1:80/hook",
    "http://127.0.0.1:49152/hook?x=1",
    "http://localhost:3000/",
    "https://localhost/",
    "https://127.0.0.1:8443/",
]


@pytest.mark.parametrize("url", LOOPBACK_URLS)
def test_loopback_webhook_url_is_accepted_where_allowed(url: str) -> None:
    check_webhook_url(url, allow_loopback=True)


@pytest.mark.parametrize("url", LOOPBACK_URLS)
def test_loopback_webhook_url_is_refused_elsewhere(url: str) -> None:
    with pytest.raises(AddressRefused):
        check_webhook_url(url, allow_loopback=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2/",
        "http://10.0.0.1/",
        "http://169.254.169.254/",
        "http://[::1]/",
        "http://2130706433/",
        "http://127.1/",
        "http://localhost.example.com/",
        "http://a.localhost/",
        "http://user@localhost/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:70000/",
        "ftp://127.0.0.1/",
    ],
)
def test_other_private_url_is_refused_where_loopback_is_allowed(url: str) -> None:
    with pytest.raises(AddressRefused):
        check_webhook_url(url, allow_loopback=True)


class Recording(httpcore.NetworkBackend):
    """A network in which every address leads to one loopback port, except those that are down."""

    def __init__(self, port: int = 0, down: Iterable[str] = ()) -> None:
        self.dialled: list[str] = []
        self._port = port
        self._down = frozenset(down)

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        self.dialled.append(host)
        if host in self._down:
            raise httpcore.ConnectTimeout("down")
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self._port, timeout)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))  # type: ignore[attr-defined]  # the test's own list
        self.send_response(302 if self.path == "/redirect" else 200)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", "session=1; Path=/")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    seen: list[dict[str, str]]

    def handle_error(self, *args: Any) -> None:
        pass  # a client that refuses the certificate hangs up in the handshake


@pytest.fixture
def serve() -> Iterator[Callable[[ssl.SSLContext | None], Server]]:
    servers: list[tuple[Server, threading.Thread]] = []

    def start(tls: ssl.SSLContext | None = None) -> Server:
        server = Server(("127.0.0.1", 0), Handler)
        server.seen = []
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of hooks.example.com with its key, in one file."""
    return certificate_of("hooks.example.com", tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_server(serve: Callable[[ssl.SSLContext | None], Server], certificate: Path) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return serve(context)


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.0.0.1", "::1"], ["169.254.169.254"], ["::ffff:1.1.1.1"], []])
def test_name_without_public_address_is_refused_before_any_dialling(addresses: list[str]) -> None:
    network = Recording()
    with (
        guarded_client(resolve=lambda host, port: addresses, network=network) as client,
        pytest.raises(AddressRefused, match="private or reserved"),
    ):
        client.get("https://hooks.example.com/")
    assert network.dialled == []


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1/", "https://[::1]/", "https://2130706433/", "https://0x7f.1/", "https://localhost/"],
)
def test_private_address_is_refused_by_the_real_resolver(url: str) -> None:
    network = Recording()
    with (
        guarded_client(network=network) as client,
        pytest.raises((AddressRefused, httpx.InvalidURL, httpx.ConnectError)),
    ):
        client.get(url)
    assert network.dialled == []


def test_plain_http_is_refused_before_any_look_up() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("looked up")

    with guarded_client(resolve=resolve) as client, pytest.raises(AddressRefused, match="https"):
        client.get("http://hooks.example.com/")


def test_name_that_does_not_resolve_is_a_connect_error() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    with guarded_client(resolve=resolve) as client, pytest.raises(httpx.ConnectError, match="resolve"):
        client.get("https://hooks.example.com/")


@pytest.fixture
def silent_name_server() -> Iterator[Callable[[str, int], list[str]]]:
    """A resolver that answers when the test is over."""
    over = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        over.wait(30)
        return [PUBLIC]

    yield resolve
    over.set()


@pytest.mark.parametrize("limit", ["connect timeout", "whole time", "both"])
def test_lookup_without_answer_ends_with_the_time_that_a_connection_may_take(
    silent_name_server: Callable[[str, int], list[str]], limit: str
) -> None:
    started = time.monotonic()
    network = Recording() if limit == "connect timeout" else TimedNetwork(lambda: started + 0.2 - time.monotonic())
    timeout = httpx.Timeout(60, connect=60 if limit == "whole time" else 0.2)
    with (
        guarded_client(resolve=silent_name_server, network=network, timeout=timeout) as client,
        pytest.raises(httpx.ConnectTimeout, match="not resolved in time"),
    ):
        client.get("https://hooks.example.com/")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "bypass",
    [
        {"transport": httpx.MockTransport(lambda request: httpx.Response(200))},
        {"mounts": {}},
        {"proxy": "http://127.0.0.1:1"},
        {"trust_env": True},
        {"follow_redirects": True},
        {"cookies": {"a": "b"}},
    ],
)
def test_option_that_goes_around_the_guard_is_an_error(bypass: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        guarded_client(**bypass)


def test_name_is_looked_up_once_and_exactly_the_checked_address_is_dialled(
    tls_server: Server, certificate: Path
) -> None:
    answers = iter([["10.0.0.1", PUBLIC, "127.0.0.1"], ["127.0.0.1"]])  # a second look-up would be the rebinding
    network = Recording(tls_server.server_port)
    context = ssl.create_default_context(cafile=str(certificate))
    with guarded_client(resolve=lambda host, port: next(answers), network=network, verify=context) as client:
        assert client.get("https://hooks.example.com/").text == "ok"
    assert network.dialled == [PUBLIC]
    assert tls_server.seen[0]["Host"] == "hooks.example.com"
    assert next(answers) == ["127.0.0.1"]


def test_address_that_is_down_leaves_the_next_one_to_try(tls_server: Server, certificate: Path) -> None:
    network = Recording(tls_server.server_port, down=["1.1.1.1"])
    context = ssl.create_default_context(cafile=str(certificate))
    with guarded_client(resolve=lambda host, port: ["1.1.1.1", PUBLIC], network=network, verify=context) as client:
        assert client.get("https://hooks.example.com/").status_code == 200
    assert network.dialled == ["1.1.1.1", PUBLIC]


def test_all_addresses_down_is_httpx_s_own_timeout() -> None:
    network = Recording(down=["1.1.1.1", PUBLIC])
    with (
        guarded_client(resolve=lambda host, port: ["1.1.1.1", PUBLIC], network=network) as client,
        pytest.raises(httpx.ConnectTimeout),
    ):
        client.get("https://hooks.example.com/")
    assert network.dialled == ["1.1.1.1", PUBLIC]


@pytest.mark.parametrize("extensions", [{}, {"sni_hostname": "hooks.example.com"}])
def test_certificate_of_another_name_is_refused(
    tls_server: Server, certificate: Path, extensions: dict[str, Any]
) -> None:
    network = Recording(tls_server.server_port)
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        guarded_client(resolve=lambda host, port: [PUBLIC], network=network, verify=context) as client,
        pytest.raises(httpx.ConnectError, match="certificate"),
    ):
        client.get("https://other.example.com/", extensions=extensions)
    assert tls_server.seen == []


def test_unknown_certificate_is_refused(tls_server: Server) -> None:
    network = Recording(tls_server.server_port)
    with (
        guarded_client(resolve=lambda host, port: [PUBLIC], network=network) as client,
        pytest.raises(httpx.ConnectError, match="certificate"),
    ):
        client.get("https://hooks.example.com/")


def test_allowed_origin_is_reached_and_no_other_port_of_its_host(
    serve: Callable[[ssl.SSLContext | None], Server],
) -> None:
    allowed, other = serve(None), serve(None)
    with guarded_client(allowed_origins=[f"http://127.0.0.1:{allowed.server_port}"]) as client:
        assert client.get(f"http://127.0.0.1:{allowed.server_port}/").text == "ok"
        for url in (f"http://127.0.0.1:{other.server_port}/", f"https://127.0.0.1:{allowed.server_port}/"):
            with pytest.raises(AddressRefused):
                client.get(url)
    assert other.seen == []


def test_client_follows_no_redirect_keeps_no_cookie_and_ignores_the_environment(
    serve: Callable[[ssl.SSLContext | None], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    server = serve(None)
    origin = f"http://127.0.0.1:{server.server_port}"
    with guarded_client(allowed_origins=[origin], headers={"X-Ours": "1"}) as client:
        assert client.get(f"{origin}/redirect").status_code == 302
        assert client.get(f"{origin}/").status_code == 200
        assert not client.cookies
    assert [headers.get("Cookie") for headers in server.seen] == [None, None]
    assert [headers["X-Ours"] for headers in server.seen] == ["1", "1"]

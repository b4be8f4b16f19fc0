import datetime
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from predictions.addresses import AddressRefused, check_webhook_url, guarded_client, is_public

PUBLIC = "93.184.215.14"

NOT_PUBLIC = [
    "0.0.0.0",  # noqa: S104  # an address to refuse, nothing binds to it
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:93.184.215.14",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::5db8:d70e",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:2::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:5db8:d70e::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c%eth0",
    "fec0::1",
    "ff02::1",
    "",
    "localhost",
    "2130706433",
    "0x7f000001",
    "127.1",
    "010.0.0.1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_special_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "2606:2800:21f:cb07::1"],
)
def test_global_address_is_public(address: str) -> None:
    assert is_public(address)


REFUSED_URLS = [
    ("", "ASCII"),
    ("hooks.example.com/x", "https"),
    ("//hooks.example.com/x", "https"),
    ("https:hooks.example.com", "https"),
    ("https:/hooks.example.com", "https"),
    ("http://hooks.example.com/", "https"),
    ("ftp://hooks.example.com/", "https"),
    ("file:///etc/passwd", "https"),
    ("javascript://hooks.example.com/%0aalert(1)", "https"),
    ("https://", "host name"),
    ("https:///path", "host name"),
    ("https://?query", "host name"),
    ("https://:443/", "host name"),
    ("https://user@hooks.example.com/", "password"),
    ("https://user:secret@hooks.example.com/", "password"),
    ("https://@hooks.example.com/", "password"),
    ("https://hooks.example.com\\@127.0.0.1/", "backslash"),
    ("https://hooks.example.com/#there", "fragment"),
    ("https://hooks.example.com#@127.0.0.1/", "fragment"),
    ("https://hooks.example.com/a b", "ASCII"),
    (" https://hooks.example.com/", "ASCII"),
    ("https://hooks.example.com/\n", "ASCII"),
    ("https://hooks.exam\tple.com/", "ASCII"),
    ("https://hooks.example.com/\x00", "ASCII"),
    ("https://hooks.example.com/\x7f", "ASCII"),
    ("https://höoks.example.com/", "ASCII"),
    ("https://127。0。0。1/", "ASCII"),
    ("https://①②⑦.⓪.⓪.①/", "ASCII"),
    ("https://hooks.example.com/" + "x" * 2048, "longer"),
    ("https://hooks.example.com:0/", "port"),
    ("https://hooks.example.com:65536/", "port"),
    ("https://hooks.example.com:99999/", "port"),
    ("https://hooks.example.com:999999/", "port"),
    ("https://hooks.example.com:/", "port"),
    ("https://hooks.example.com:-1/", "port"),
    ("https://hooks.example.com:+443/", "port"),
    ("https://hooks.example.com:4_43/", "port"),
    ("https://hooks.example.com:https/", "port"),
    ("https://hooks.example.com:443:443/", "port"),
    ("https://hooks.example.com:22/", "port 443"),
    ("https://hooks.example.com:80/", "port 443"),
    ("https://hooks.example.com:1023/", "port 443"),
    ("https://localhost/", "private network"),
    ("https://LOCALHOST/", "private network"),
    ("https://api.localhost/", "private network"),
    ("https://printer.local/", "private network"),
    ("https://metadata.google.internal/", "private network"),
    ("https://ip-10-0-0-1.eu-west-1.compute.internal/", "private network"),
    ("https://nas.home.arpa/", "private network"),
    ("https://localhost./", "valid host"),
    ("https://hooks.example.com./", "valid host"),
    ("https://intra/", "full host name"),
    ("https://.example.com/", "valid host"),
    ("https://hooks..example.com/", "valid host"),
    ("https://hooks-.example.com/", "valid host"),
    ("https://hooks%2eexample.com/", "valid host"),
    ("https://hooks,example.com/", "valid host"),
    (f"https://{'a' * 64}.example.com/", "valid host"),
    (f"https://{'a.' * 127}com/", "valid host"),
    ("https://127.0.0.1/", "private or reserved"),
    ("https://127.0.0.1:8443/", "private or reserved"),
    ("https://127.0.0.1./", "valid host"),
    ("https://10.0.0.1/", "private or reserved"),
    ("https://169.254.169.254/latest/meta-data/", "private or reserved"),
    ("https://2130706433/", "private or reserved"),
    ("https://017700000001/", "private or reserved"),
    ("https://0x7f000001/", "private or reserved"),
    ("https://0x7f.1/", "private or reserved"),
    ("https://0X7F.0.0.0x1/", "private or reserved"),
    ("https://0177.0.0.1/", "private or reserved"),
    ("https://127.1/", "private or reserved"),
    ("https://127.0.1/", "private or reserved"),
    ("https://0/", "private or reserved"),
    ("https://1.2.3.4.5/", "private or reserved"),
    ("https://256.256.256.256/", "private or reserved"),
    ("https://example.0x/", "private or reserved"),
    (
        "https://1572395042/",
        "private or reserved",
    ),  # 93.184.215.34: public, but not written as an address
    ("https://[::1]/", "private or reserved"),
    ("https://[::ffff:127.0.0.1]/", "private or reserved"),
    ("https://[::ffff:7f00:1]/", "private or reserved"),
    ("https://[64:ff9b::7f00:1]/", "private or reserved"),
    ("https://[2002:7f00:1::]/", "private or reserved"),
    ("https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/", "private or reserved"),
    ("https://[fd00:ec2::254]/", "private or reserved"),
    ("https://[fe80::1%25eth0]/", "."),
    ("https://[::1", "valid URL"),
    ("https://[::1]x/", "."),
    ("https://[v1.x]/", "."),
]


@pytest.mark.parametrize(("url", "reason"), REFUSED_URLS)
def test_bad_webhook_url_is_refused_with_a_reason(url: str, reason: str) -> None:
    with pytest.raises(AddressRefused, match=reason) as refused:
        check_webhook_url(url, allow_loopback=False)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", [url for url, _ in REFUSED_URLS if not re.match(r"(?i)https://(localhost|127\.0\.0\.1)[:/]", url)]
)
def test_bad_webhook_url_is_refused_where_loopback_is_allowed_too(url: str) -> None:
    with pytest.raises(AddressRefused):
        check_webhook_url(url, allow_loopback=True)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com",
        "https://hooks.example.com/path?with=query&id=1",
        "HTTPS://Hooks.Example.COM/",
        "https://hooks.example.com:443/",
        "https://hooks.example.com:1024/",
        "https://hooks.example.com:8443/",
        "https://hooks.example.com:65535/",
        "https://hooks.example.com?id=1",
        "https://hooks.example.com/user@example.com",
        "https://my_service.example.com/",
        "https://xn--hoks-5qa.example.com/",
        "https://1a.example.com/",
        "https://localhost.example.com/",
        "https://10.0.0.1.example.com/",
        f"https://{PUBLIC}/",
        "https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]:8443/",
        "https://hooks.example.com/" + "x" * (2048 - 26),
    ],
)
@pytest.mark.parametrize("allow_loopback", [False, True])
def test_public_webhook_url_is_accepted(url: str, allow_loopback: bool) -> None:
    check_webhook_url(url, allow_loopback=allow_loopback)


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
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example.com")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


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

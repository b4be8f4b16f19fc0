import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpcore
import pytest
from predictions.net.addresses import AddressRefused
from predictions.net.downloads import Download, DownloadClient, DownloadFailed, UrlInvalid

from tests.support.certificates import certificate_of
from tests.support.hosts import Answer, HostileHost, endless, head, hostile_host, sends, silent, whole

PUBLIC = "93.184.215.14"
MIB = 1024**2


@pytest.fixture
def hosts() -> Iterator[Callable[..., HostileHost]]:
    with ExitStack() as stack:
        yield lambda answers: stack.enter_context(hostile_host(answers))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate_of("files.example.com", tmp_path_factory.mktemp("tls"))


def over_tls(certificate: Path, answer: Answer) -> Callable[[socket.socket], None]:
    """Serves one connection, whatever is asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(65536)
            answer(wrapped)

    return serve


class Network(httpcore.NetworkBackend):
    """A network in which every address leads to one connection, which is served in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.dialled: list[tuple[str, int]] = []
        self._serve = serve

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: Any, **__: Any) -> Any:
        self.dialled.append((host, port))

        self._listening = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            # The client hangs up where it refuses the certificate.
            with self._listening.accept()[0] as connection, suppress(OSError):
                self._serve(connection)

        self.thread = threading.Thread(target=accept)
        self.thread.start()
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self._listening.getsockname()[1], timeout)

    def close(self) -> None:
        self.thread.join()
        self._listening.close()


def whole_of(download: Download, size: int = 10**9) -> bytes:
    pieces = []
    while piece := download.read(size):
        pieces.append(bytes(piece))
    return b"".join(pieces)


def client_of(host: HostileHost, **options: Any) -> DownloadClient:
    return DownloadClient(allowed_origins=[host.origin], **options)


# ---- the guard


def test_file_is_read_over_tls_from_the_public_address_that_was_checked(certificate: Path) -> None:
    content = bytes(range(256)) * 8000
    network = Network(over_tls(certificate, sends(whole(content))))
    tls = ssl.create_default_context(cafile=str(certificate))
    names = iter([["10.0.0.1", PUBLIC], ["10.0.0.1"]])
    with (
        DownloadClient(resolve=lambda host, port: next(names), network=network, tls=tls) as client,
        client.open("https://files.example.com/a?b#c", {"User-Agent": "x"}) as download,
    ):
        assert (download.status, download.length) == (200, len(content))
        assert whole_of(download, 100_000) == content
    network.close()
    assert network.dialled == [(PUBLIC, 443)]


@pytest.mark.parametrize("name", ["other.example.com", "files.example.com"])
def test_certificate_of_another_name_or_authority_is_refused(certificate: Path, name: str) -> None:
    network = Network(over_tls(certificate, sends(whole(b"secret"))))
    tls = ssl.create_default_context(cafile=str(certificate)) if name.startswith("other") else None
    with (
        DownloadClient(resolve=lambda host, port: [PUBLIC], network=network, tls=tls) as client,
        pytest.raises(DownloadFailed, match="ConnectError"),
    ):
        client.open(f"https://{name}/", {})
    network.close()


@pytest.mark.parametrize("address", ["10.0.0.1", "127.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fd00::1"])
def test_private_address_is_refused_before_any_connection(address: str) -> None:
    network = Network(lambda connection: None)
    with DownloadClient(resolve=lambda host, port: [address], network=network) as client:
        with pytest.raises(AddressRefused, match="private or reserved"):
            client.open("https://files.example.com/", {})
        with pytest.raises(AddressRefused, match="https"):
            client.open("http://files.example.com/", {})
    assert network.dialled == []


def test_connection_that_was_opened_unchecked_is_used_for_its_origin_only(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": keeps(whole(b"x"))})
    with client_of(host, resolve=lambda name, port: ["127.0.0.1"]) as client:
        with client.open(f"{host.origin}/", {}) as download:
            assert whole_of(download) == b"x"
        with pytest.raises(AddressRefused):
            client.open(f"https://files.example.com:{host.port}/", {})
    assert host.connections == 1


@pytest.mark.parametrize("url", ["https://files.example.com/\x00", "https://files.example.com/" + "x" * 70_000])
def test_url_that_cannot_be_read_is_refused(url: str) -> None:
    with DownloadClient() as client, pytest.raises(UrlInvalid):
        client.open(url, {})


# ---- connections


def keeps(response: bytes) -> Answer:
    """Answers each request of a connection, until the other side goes."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(response)
        while connection.recv(65536):
            connection.sendall(response)

    return answer


def read_twice(host: HostileHost, **options: Any) -> list[bytes]:
    found = []
    with client_of(host, **options) as client:
        for _ in range(2):
            with client.open(f"{host.origin}/", {}) as download:
                found.append(whole_of(download))
    return found


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_connection_is_used_again_after_a_whole_body(hosts: Callable[..., HostileHost], framing: str) -> None:
    chunked = head("Transfer-Encoding: chunked") + b"4\r\nfile\r\n0\r\n\r\n"
    host = hosts({"": keeps(whole(b"file") if framing == "length" else chunked)})
    assert read_twice(host) == [b"file"] * 2
    assert host.connections == 1


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(whole(b"file", "image/png", "Connection: close"), id="closes"),
        pytest.param(whole(b"file", "image/png", "Connection: x, Close"), id="closes, in a list"),
        pytest.param(whole(b"file") + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", id="has more"),
        pytest.param(head("Transfer-Encoding: chunked") + b"4\r\nfile\r\n0\r\n\r\nevil", id="has more after chunks"),
        pytest.param(whole(b"file").replace(b"HTTP/1.1", b"HTTP/1.0"), id="is of HTTP/1.0"),
    ],
)
def test_connection_is_not_used_again_after_a_response_that(hosts: Callable[..., HostileHost], response: bytes) -> None:
    host = hosts({"": sends(response)})
    assert read_twice(host) == [b"file"] * 2
    assert host.connections == 2


def test_connection_is_not_used_again_after_a_part_of_a_body(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": keeps(whole(b"file"))})
    with client_of(host) as client:
        for _ in range(2):
            with client.open(f"{host.origin}/", {}) as download:
                assert bytes(download.read(1)) == b"f"
    assert host.connections == 2


def test_connection_is_not_used_again_after_five_seconds(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": keeps(whole(b"file"))})
    times = iter([0.0, 5.0, 5.0])
    assert read_twice(host, clock=lambda: next(times)) == [b"file"] * 2
    assert host.connections == 2


# ---- bodies


def test_pieces_of_a_large_body_are_large_and_of_one_memory(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": sends(whole(bytes(8 * MIB)))})
    sizes, memories = [], set()
    with client_of(host) as client, client.open(f"{host.origin}/", {}) as download:
        while piece := download.read(10**9):
            sizes.append(len(piece))
            memories.add(id(piece.obj))
    assert sum(sizes) == 8 * MIB
    assert max(sizes) <= 256 * 1024
    assert len(memories) <= 2, "the second one has what came with the head"


def test_piece_is_given_as_soon_as_it_is_there(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": silent(head("Content-Length: 1000") + b"some")})
    with client_of(host) as client, client.open(f"{host.origin}/", {}) as download:
        assert bytes(download.read(1000)) == b"some"


@pytest.mark.parametrize("start", [head("Content-Length: 1000"), head("Content-Length: 1000") + b"some"])
def test_body_that_stops_ends_with_the_time_of_the_thread(hosts: Callable[..., HostileHost], start: bytes) -> None:
    host = hosts({"": silent(start)})
    left = 10.0
    with client_of(host, left=lambda: left) as client, client.open(f"{host.origin}/", {}) as download:
        left = 0.05
        with pytest.raises(DownloadFailed, match="ReadTimeout"):
            whole_of(download)


def test_body_ends_with_the_time_of_the_thread_however_fast_it_comes(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": endless(bytes(65536), start=head(f"Content-Length: {10**15}"))})
    left = 10.0
    with client_of(host, left=lambda: left) as client, client.open(f"{host.origin}/", {}) as download:
        download.read(1)
        left = 0.0
        with pytest.raises(DownloadFailed, match="ReadTimeout"):
            whole_of(download)


def test_body_that_breaks_off_is_an_error(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": sends(head("Content-Length: 10") + b"x" * 9)})
    with (
        client_of(host) as client,
        client.open(f"{host.origin}/", {}) as download,
        pytest.raises(DownloadFailed, match="RemoteProtocolError"),
    ):
        whole_of(download)


def test_nothing_is_read_beyond_the_announced_length(hosts: Callable[..., HostileHost]) -> None:
    host = hosts({"": sends(whole(b"file") + b"more")})
    with client_of(host) as client, client.open(f"{host.origin}/", {}) as download:
        assert whole_of(download) == b"file"
        assert bytes(download.read(1)) == b""


@pytest.mark.parametrize(
    "framing",
    [
        head("Content-Length: 4", "Transfer-Encoding: chunked") + b"8\r\nfilefile\r\n0\r\n\r\n",
        head() + b"filefile",
    ],
)
def test_length_that_does_not_end_the_body_is_no_length(hosts: Callable[..., HostileHost], framing: bytes) -> None:
    host = hosts({"": sends(framing)})
    with client_of(host) as client, client.open(f"{host.origin}/", {}) as download:
        assert download.length is None
        assert whole_of(download, 3) == b"filefile"

# ruff: noqa: E501 - tables are read by lines, some of which are longer
"""Addresses that are nobody's business, at both doors and on every way there: callers' receivers, and output files."""

import ipaddress
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.files.outputs_bucket import OutputsBucket
from predictions.net.addresses import AddressRefused, check_webhook_url, is_public
from predictions.net.client import guarded_client
from predictions.notifications.webhook_queue import Delivery
from predictions.store.predictions import PredictionsTable

from tests.reliability import Recorded
from tests.support.apps import Context, clock_module, load_app, sample
from tests.support.fakes import VERSION, Clock
from tests.support.hosts import HostileHost, head, hostile_host, sends, whole
from tests.support.predictions import put, told
from tests.support.webhook_queue import hook

PRIVATE = "leads to a private or reserved address"


def embedded(address: str) -> list[str]:
    """An IPv4 address within IPv6, in all ways that there are, and in their notations."""
    a, b, c, d = (int(part) for part in address.split("."))
    high, low = f"{a:02x}{b:02x}", f"{c:02x}{d:02x}"
    return [
        f"::ffff:{address}",  # mapped: RFC 4291, section 2.5.5.2
        f"::ffff:{high}:{low}",
        f"::FFFF:{address}",
        f"0:0:0:0:0:ffff:{high}:{low}",
        f"0000:0000:0000:0000:0000:ffff:{address}",
        f"::{address}",  # compatible: section 2.5.5.1
        f"::{high}:{low}",
        f"::ffff:0:{address}",  # translated: RFC 2765
        f"::ffff:0:{high}:{low}",
        f"64:ff9b::{address}",  # NAT64: RFC 6052
        f"64:ff9b::{high}:{low}",
        f"64:ff9b:1::{address}",  # NAT64 of a network's own: RFC 8215
        f"64:ff9b:1:{high}:0:{low}::",
        f"2002:{high}:{low}::",  # 6to4: RFC 3056
        f"2002:{high}:{low}::1",
        f"2001:0:{high}:{low}::1",  # Teredo, as its server: RFC 4380
        f"2001:0:4136:e378:8000:63bf:{int(high, 16) ^ 0xFFFF:x}:{int(low, 16) ^ 0xFFFF:x}",  # as its client
        f"fe80::5efe:{address}",  # ISATAP: RFC 5214
    ]


# By family; the names are those of https://www.iana.org/assignments/iana-ipv4-special-registry and -ipv6-.
NOT_PUBLIC: dict[str, list[str]] = {
    "loopback": ["127.0.0.1", "127.0.0.2", "127.1.2.3", "127.255.255.254", "127.255.255.255", "::1", "0::1"],
    "this network": ["0.0.0.0", "0.0.0.1", "0.255.255.255", "::", "0:0:0:0:0:0:0:0"],  # noqa: S104  # to be refused
    "private": [
        "10.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.0", "172.16.0.1", "172.31.255.255", "192.168.0.0",
        "192.168.1.1", "192.168.255.255", "fc00::", "fc00::1", "fd00::1", "fdff:ffff::1",
    ],
    "link-local": ["169.254.0.0", "169.254.0.1", "169.254.255.255", "fe80::", "fe80::1", "febf:ffff::1"],
    "metadata of EC2": ["169.254.169.254", "fd00:ec2::254", "fd00:ec2:0:0:0:0:0:254"],
    "other services of Amazon's networks": [
        "169.254.169.253", "fd00:ec2::253", "169.254.169.123", "fd00:ec2::123", "169.254.169.250", "fd20:ce::254",
    ],
    "credentials of containers": ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"],
    "metadata of other clouds": ["100.100.100.200", "192.0.0.192"],
    "carrier NAT": ["100.64.0.0", "100.64.0.1", "100.127.255.255"],
    "multicast": ["224.0.0.0", "224.0.0.1", "239.255.255.255", "ff00::", "ff02::1", "ff0e::1", "ffff::"],
    "broadcast and reserved": ["240.0.0.0", "240.0.0.1", "254.1.1.1", "255.255.255.255"],
    "protocols": ["192.0.0.0", "192.0.0.8", "192.0.0.170", "192.0.0.255", "192.88.99.1", "2001::", "2001:1::1"],
    "documentation": [
        "192.0.2.0", "192.0.2.1", "198.51.100.1", "203.0.113.255", "2001:db8::", "2001:db8::1",
        "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "3fff::", "3fff::1", "3fff:fff:ffff::1",
    ],
    "benchmarks and the like": ["198.18.0.0", "198.19.255.255", "2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff::1"],
    "nowhere": ["100::", "100::1", "100:0:0:1::1", "5f00::1", "4000::1", "1fff::1", "8000::1", "c000::1", "e000::1"],
    "site-local": ["fec0::", "fec0::1", "feff::1"],
    "IPv4 in IPv6": [form for address in ("127.0.0.1", "10.0.0.1", "169.254.169.254") for form in embedded(address)],
    # What a gateway would make of them is its own business: also public addresses are refused in these clothes.
    "public IPv4 in IPv6": embedded("93.184.215.14"),
    "zones": ["fe80::1%eth0", "fe80::1%1", "::1%lo", "2606:2800:21f:cb07:6820:80da:af6b:8b2c%eth0", "ff02::1%2"],
}  # fmt: skip

ADDRESSES = [address for family in NOT_PUBLIC.values() for address in family]

# What is no address in its one usual notation, so that nobody's parser is asked.
OTHER_NOTATIONS = [
    "", " ", "localhost", "2130706433", "0x7f000001", "0X7F000001", "017700000001", "127.1", "127.0.1", "127.0.0.01",
    "010.0.0.1", "0x7f.0.0.1", "0x7f.1", "0177.0.0.1", "00000177.0.0.1", "127.0.0.1.", "127.0.0.1 ", " 127.0.0.1",
    "127.0.0.1\n", "127.0.0.1\0", "127.0.0.1:80", "127.0.0.1/8", "127.0.0.256", "127.0.0", "1.2.3.4.5", "256.1.1.1",
    "-1.0.0.1", "+1.1.1.1", "1e0.1.1.1", "1.1.1.1e0", "\uff11\uff12\uff17.0.0.1", "①②⑦.⓪.⓪.①", "127\u30020\u30020\u30021",
    "127\uff0e0\uff0e0\uff0e1", "١٢٧.0.0.1", "[::1]", "::1/128", ":::1", "::1::", "1:2:3:4:5:6:7:8:9", "::12345", "::g",
    "2606:2800:21f:cb07:6820:80da:af6b", "0x2606::1", "::ffff:127.0.0.1.", "::ffff:0177.0.0.1", "::ffff:127.1", "4294967296",
    "18446744073709551617", "93.184.215.014", "0135.184.215.14", "1572395022", "one.one.one.one", "\ud800",
]  # fmt: skip

PUBLIC = [
    "93.184.215.14", "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255",
    "128.0.0.1", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "191.255.255.255", "192.0.1.0",
    "192.0.3.0", "192.88.98.255", "192.88.100.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0",
    "198.51.99.255", "198.51.101.0", "203.0.112.255", "203.0.114.0", "223.255.255.255", "2000::1", "2001:200::1",
    "2001:4860:4860::8888", "2001:db7::1", "2001:db9::1", "2003::1", "2600:1f00::1", "2606:2800:21f:cb07::1",
    "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "3ffe::1", "3fff:1000::1", "2606:2800:21F:CB07::1",
]  # fmt: skip


def test_no_special_address_is_public_in_any_notation(record_property: Recorded) -> None:
    record_property("addresses", len(ADDRESSES + OTHER_NOTATIONS))
    assert [address for address in ADDRESSES + OTHER_NOTATIONS if is_public(address)] == []


def test_addresses_around_the_special_ones_are_public(record_property: Recorded) -> None:
    record_property("addresses", len(PUBLIC))
    assert [address for address in PUBLIC if not is_public(address)] == []


def test_whatever_python_calls_not_global_is_not_public() -> None:
    """An independent list: https://docs.python.org/3/library/ipaddress.html#ipaddress.IPv4Address.is_global"""
    first = [f"{a}.{b}.{c}.1" for a in range(256) for b in range(0, 256, 2) for c in (0, 2, 100)]
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [ipaddress.IPv4Address(each) for each in first]
    addresses += [ipaddress.IPv6Address((a << 112) | (b << 96) | 1) for a in range(0, 65536, 31) for b in (0, 1, 0xDB8)]
    wrong = [each for each in addresses if is_public(str(each)) and (not each.is_global or each.is_multicast)]
    assert wrong == []


# -- the first door: what a caller may name ------------------------------------------------------------------------


def bracketed(address: str) -> str:
    return f"[{address.replace('%', '%25')}]" if ":" in address else address


# Each with a word of its reason; what a parser might make of it besides is in the name of the family.
REFUSED_URLS: dict[str, list[tuple[str, str]]] = {
    "schemes": [
        ("", "ASCII"), ("hooks.example.com/x", "https"), ("//hooks.example.com/x", "https"),
        ("https:hooks.example.com", "https"), ("https:/hooks.example.com", "https"), ("https:///hooks.example.com", "host"),
        ("http://hooks.example.com/", "https"), ("ftp://hooks.example.com/", "https"), ("file:///etc/passwd", "https"),
        ("gopher://127.0.0.1:6379/_x", "https"), ("dict://127.0.0.1:11211/", "https"), ("ldap://127.0.0.1/", "https"),
        ("ws://hooks.example.com/", "https"), ("wss://hooks.example.com/", "https"), ("unix:///var/run/x.sock", "https"),
        ("data:text/plain,x", "https"), ("javascript://hooks.example.com/%0aalert(1)", "https"),
        ("httpss://hooks.example.com/", "https"), ("xhttps://hooks.example.com/", "https"), ("https//x.example.com", "https"),
        ("url:https://hooks.example.com/", "https"), ("view-source:https://hooks.example.com/", "https"),
    ],
    "hosts": [
        ("https://", "host name"), ("https:///path", "host name"), ("https://?query", "host name"),
        ("https://:443/", "host name"), ("https://hooks.example.com./", "valid host"), ("https://intra/", "full host name"),
        ("https://.example.com/", "valid host"), ("https://hooks..example.com/", "valid host"),
        ("https://hooks-.example.com/", "valid host"), ("https://hooks%2eexample.com/", "valid host"),
        ("https://hooks,example.com/", "valid host"), ("https://*.example.com/", "valid host"),
        (f"https://{'a' * 64}.example.com/", "valid host"), (f"https://{'a.' * 127}com/", "valid host"),
        ("https://hooks.example.com/" + "x" * 2048, "longer"),
    ],
    "credentials": [
        ("https://user@hooks.example.com/", "password"), ("https://user:secret@hooks.example.com/", "password"),
        ("https://@hooks.example.com/", "password"), ("https://:@hooks.example.com/", "password"),
        ("https://hooks.example.com@127.0.0.1/", "password"), ("https://hooks.example.com:443@127.0.0.1/", "password"),
        ("https://a@b@127.0.0.1/", "password"), ("https://127.0.0.1@hooks.example.com/", "password"),
        ("https://user%40hooks.example.com/", "valid host"), ("https://hooks.example.com%40127.0.0.1/", "private or reserved"),
    ],
    "backslashes and other tricks of parsers": [
        ("https://hooks.example.com\\@127.0.0.1/", "backslash"), ("https:\\\\127.0.0.1/", "backslash"),
        ("https://hooks.example.com\\.127.0.0.1/", "backslash"), ("https://hooks.example.com/#there", "fragment"),
        ("https://hooks.example.com#@127.0.0.1/", "fragment"), ("https://hooks.example.com/a b", "ASCII"),
        (" https://hooks.example.com/", "ASCII"), ("https://hooks.example.com/\n", "ASCII"),
        ("https://hooks.exam\tple.com/", "ASCII"), ("ht\ntps://hooks.example.com/", "ASCII"),
        ("https://hooks.example.com/\r\nHost: x", "ASCII"), ("https://hooks.example.com/\x00", "ASCII"),
        ("https://hooks.example.com/\x7f", "ASCII"), ("https://[::1", "valid URL"), ("https://[::1]x/", ""),
        ("https://[v1.x]/", ""), ("https://[]/", ""), ("https://[[::1]]/", ""), ("https://::1/", ""),
        ("https://hooks.example.com;127.0.0.1/", "private or reserved"), ("https://hooks.example.com&127.0.0.1/", "private or reserved"),
    ],
    "characters that a name becomes another one by": [
        ("https://höoks.example.com/", "ASCII"), ("https://127。0。0。1/", "ASCII"), ("https://①②⑦.⓪.⓪.①/", "ASCII"),
        ("https://\uff11\uff12\uff17.0.0.1/", "ASCII"), ("https://\uff4c\uff4f\uff43\uff41lhost/", "ASCII"),
        ("https://ⓛocalhost/", "ASCII"), ("https://\u212aube.local/", "ASCII"), ("https://hooks\u3002example.com/", "ASCII"),
        ("https://hooks.example.com\u2044x/", "ASCII"), ("https://ß.example.com/", "ASCII"), ("https://\u200b1.1.1.1/", "ASCII"),
        ("https://\ud800.example.com/", "ASCII"), ("https://127.0.0.1\u00ad/", "ASCII"), ("https://\uff11\uff12\uff17.\uff11/", "ASCII"),
    ],
    "ports": [
        *[
            (f"https://hooks.example.com:{port}/", "port")
            for port in ("0", "65536", "99999", "999999", "", "-1", "+443", "4_43", "https", "443:443", "0x1bb", "443.0",
                         " 443", "%34%34%33", "1e3")
            if " " not in port
        ],
        *[
            (f"https://hooks.example.com:{port}/", "port 443")
            for port in (1, 7, 22, 23, 25, 53, 80, 110, 143, 445, 465, 587, 993, 1023)
        ],
        ("https://127.0.0.1:9001/2018-06-01/runtime/invocation/next", "private or reserved"),
    ],
    "names of private networks": [
        (f"https://{name}/", "private network")
        for name in (
            "localhost", "LOCALHOST", "api.localhost", "printer.local", "localhost.localdomain", "x.lan", "x.intranet",
            "metadata.google.internal", "ip-10-0-0-1.eu-west-1.compute.internal", "nas.home.arpa", "a.b.INTERNAL",
        )
    ] + [("https://localhost./", "valid host"), ("https://metadata.google.internal./", "valid host")],
    "addresses": [(f"https://{bracketed(address)}/", "") for address in ADDRESSES],
    "other notations of addresses": [
        (f"https://{host}/", "private or reserved")
        for host in (
            "2130706433", "017700000001", "0x7f000001", "0x7f.1", "0X7F.0.0.0x1", "0177.0.0.1", "127.1", "127.0.1", "0",
            "1.2.3.4.5", "256.256.256.256", "example.0x", "0x", "0x7F000001", "00000000177.1", "127.0x0.0.1", "4294967296",
            "3232235521", "0xa9fea9fe", "0251.0376.0251.0376", "2852039166", "169.254.43518", "0xa9.0xfe.0xa9.0xfe",
            "0251.254.169.254", "169.0xfea9fe", "100.0x40.1", "1572395022", "93.184.55054", "0x5d.184.215.14",
        )
    ] + [("https://127.0.0.1./", "valid host"), ("https://1.1.1.1./", "valid host"), ("https://0x7f000001./", "valid host")],
}  # fmt: skip

ALLOWED_URLS = [
    "https://hooks.example.com", "https://hooks.example.com/path?with=query&id=1", "HTTPS://Hooks.Example.COM/",
    "https://hooks.example.com:443/", "https://hooks.example.com:1024/", "https://hooks.example.com:8443/",
    "https://hooks.example.com:65535/", "https://hooks.example.com?id=1", "https://hooks.example.com/user@example.com",
    "https://my_service.example.com/", "https://xn--hoks-5qa.example.com/", "https://1a.example.com/",
    "https://localhost.example.com/", "https://10.0.0.1.example.com/", "https://internal.example.com/",
    "https://hooks.example.com/http://127.0.0.1/", "https://hooks.example.com/?u=//169.254.169.254",
    "https://127.0.0.1.nip.io/", "https://hooks.example.com/" + "x" * (2048 - 26),
    *[f"https://{bracketed(address)}/" for address in PUBLIC], "https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]:8443/",
]  # fmt: skip


@pytest.mark.parametrize("family", REFUSED_URLS)
def test_bad_webhook_url_is_refused_with_a_reason(family: str, record_property: Recorded) -> None:
    record_property("URLs", len(REFUSED_URLS[family]))
    wrong = {}
    for url, reason in REFUSED_URLS[family]:
        for allow_loopback in (False, True):
            if allow_loopback and url.lower().startswith(
                ("https://localhost/", "https://127.0.0.1/", "https://127.0.0.1:")
            ):
                continue
            try:
                check_webhook_url(url, allow_loopback=allow_loopback)
                wrong[url] = "allowed"
            except AddressRefused as refused:
                told = str(refused)
                if reason not in told or "secret" in told or (len(url) > 30 and url in told):
                    wrong[url] = told
    assert wrong == {}


@pytest.mark.parametrize("allow_loopback", [False, True])
def test_public_webhook_url_is_accepted(allow_loopback: bool) -> None:
    for url in ALLOWED_URLS:
        check_webhook_url(url, allow_loopback=allow_loopback)


def test_bad_webhook_url_is_answered_422_at_the_api_and_nothing_is_written(cloud: None) -> None:
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("start_prediction", template_only)
    event = sample("start_prediction", "version")

    def start(url: str) -> tuple[int, list[dict[str, str]]]:
        body = {"version": VERSION, "input": {"prompt": "x"}, "webhook": url}
        answer = app.handler({**event, "body": json.dumps(body), "isBase64Encoded": False}, Context())
        return answer["statusCode"], json.loads(answer["body"]).get("invalid_fields", [])

    wrong = {}
    for family in REFUSED_URLS.values():
        for url, reason in family:
            if not url.isprintable() and "\ud800" in url:
                continue  # half a character is refused with the whole body: 400
            status, fields = start(url)
            if status != 422 or [f["field"] for f in fields] != ["webhook"] or reason not in fields[0]["detail"]:
                wrong[url] = status, fields
    assert wrong == {}
    items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    assert [item for item in items if item["pk"]["S"].startswith("prediction#")] == []


# -- the second door: where the socket is opened -------------------------------------------------------------------

HOOK = "https://hooks.example.com/replicate"


class Network:
    """The names that there are, and a network in which nobody answers; `dialled` has who was called."""

    def __init__(self) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.looked_up: list[str] = []
        self.dialled: list[str] = []
        self._getaddrinfo = socket.getaddrinfo

    def getaddrinfo(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        self.looked_up.append(name)
        if name not in self.names:
            if any(letter in name.lower().removeprefix("0x") for letter in "ghijklmnopqrstuvwyz"):
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return self._getaddrinfo(host, port, *args, **options)  # an address, in the notations of inet_aton too
        answers = self.names[name]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in found
        ]

    def create_connection(self, address: tuple[str, int], *_: Any, **__: Any) -> Any:
        self.dialled.append(address[0])
        raise ConnectionRefusedError("nobody is there")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(socket, "getaddrinfo", network.getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", network.create_connection)
    return network


Deliver = Callable[[str], str]


@pytest.fixture(scope="module")
def authorities() -> ssl.SSLContext:
    """What httpx makes for each client anew; nobody here gets as far as to show a certificate."""
    return httpx.create_ssl_context(trust_env=False)


@pytest.fixture
def deliver(cloud: None, clock: Clock, authorities: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> Deliver:
    """Tells a prediction's end to a URL, which the API may have refused: why it was given up, or that it was not."""
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("deliver_webhook", template_only)
    monkeypatch.setattr(app.receivers, "_now", clock.now)
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: authorities)
    table = PredictionsTable("predictions", OutputsBucket("outputs"), clients.client("dynamodb"))
    prediction = put(table, clock, webhook=HOOK, webhook_events_filter=["completed"])
    table.merge(prediction.id, told("succeeded", output="text"), clock.now())
    sqs = clients.client("sqs")
    queue, dead = (sqs.get_queue_url(QueueName=name)["QueueUrl"] for name in ("deliveries", "dead-deliveries"))

    def deliver(url: str) -> str:
        hook(prediction.id, url)
        body = Delivery(prediction.id, "completed", 1, int(clock.now())).message()
        sqs.send_message(QueueUrl=queue, MessageBody=body)
        (message,) = sqs.receive_message(QueueUrl=queue)["Messages"]
        record = {"messageId": "1", "receiptHandle": message["ReceiptHandle"], "body": message["Body"]}
        failures = app.handler({"Records": [record]}, Context())["batchItemFailures"]
        sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
        if failures:
            return "to be tried again"
        for letter in sqs.receive_message(QueueUrl=dead).get("Messages", []):
            sqs.delete_message(QueueUrl=dead, ReceiptHandle=letter["ReceiptHandle"])
            return str(json.loads(letter["Body"])["reason"])
        return "delivered"

    return deliver


def test_receiver_at_a_special_address_is_never_dialled(deliver: Deliver, network: Network) -> None:
    # By a name that leads there; and one of each family as it is, since the first door refuses those anyway.
    literals = {family[0] for family in NOT_PUBLIC.values()}
    wrong = {}
    for address in ADDRESSES:
        network.names = {"hooks.example.com": [[address]]}
        if (found := deliver(HOOK)) != f"the address {PRIVATE}":
            wrong[address] = found
        if address in literals:
            found = deliver(f"https://{bracketed(address)}/")
            # No URL has a zone: httpx takes it for none, or the system for no address.
            if found != f"the address {PRIVATE}" and not ("%" in address and found == "to be tried again"):
                wrong[f"{address} itself"] = found
    assert wrong == {}
    assert network.dialled == []


def test_receiver_in_another_notation_or_scheme_is_never_dialled(deliver: Deliver, network: Network) -> None:
    allowed = ("to be tried again", f"the address {PRIVATE}", "the address must start with https://")
    skipped = ("ports", "credentials", "hosts", "addresses")  # which lead to names, not to addresses; above
    urls = [url for family, urls in REFUSED_URLS.items() if family not in skipped for url, _ in urls]
    urls = [url for url in urls if url and "\ud800" not in url]  # without one nobody is told
    urls += [f"https://user:secret@{host}/" for host in ("127.0.0.1", "[::1]", "169.254.169.254:80", "10.0.0.1:443")]
    wrong = {url: found for url in urls if (found := deliver(url)) not in allowed}
    assert wrong == {}
    # Some notations of the table are of public addresses, which a resolver reads as such.
    assert set(network.dialled) <= {"93.184.215.14", "93.184.216.14"}


def test_receiver_at_a_public_address_is_dialled_there_and_nowhere_else(deliver: Deliver, network: Network) -> None:
    for address in PUBLIC:
        network.names = {"hooks.example.com": [[address]]}
        assert (deliver(HOOK), network.dialled) == ("to be tried again", [address])
        network.dialled.clear()


@pytest.mark.parametrize("bad", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "169.254.170.2", "::1", "fd00:ec2::254",
                                 "::ffff:127.0.0.1", "64:ff9b::7f00:1", "0.0.0.0"])  # fmt: skip  # noqa: S104
def test_names_whose_addresses_change_or_differ_lead_to_what_was_checked(
    deliver: Deliver, network: Network, bad: str
) -> None:
    good, other = "93.184.215.14", "2606:2800:21f:cb07::1"
    tables: list[tuple[list[list[str]], list[str]]] = [
        ([[good], [bad]], [good]),  # what a second look-up would give is never asked for
        ([[bad, good]], [good]),
        ([[good, bad]], [good]),
        ([[bad, good, bad, other, bad]], [good, other]),
        ([[bad, bad]], []),
        ([[]], []),
    ]
    for answers, dialled in tables:
        network.names = {"hooks.example.com": [list(each) for each in answers]}
        network.dialled.clear()
        network.looked_up.clear()
        found = deliver(HOOK)
        assert network.dialled == dialled
        assert network.looked_up == ["hooks.example.com"]
        assert found == ("to be tried again" if dialled else f"the address {PRIVATE}")
    # At the next try the name leads elsewhere: it is looked up and checked again.
    network.names = {"hooks.example.com": [[good], [bad]]}
    network.dialled.clear()
    assert [deliver(HOOK), deliver(HOOK)] == ["to be tried again", f"the address {PRIVATE}"]
    assert network.dialled == [good]


@contextmanager
def witnesses() -> Iterator[list[HostileHost]]:
    """Who would be connected to: on this machine, in both families where there are two."""
    hosts = [HostileHost({"": sends(whole(b"secret"))}, "127.0.0.1")]
    try:
        with suppress(OSError):  # a machine without it
            hosts.append(HostileHost({"": sends(whole(b"secret"))}, "::1"))
        yield hosts
    finally:
        for host in hosts:
            host.close()


def test_who_listens_on_this_machine_sees_no_connection(deliver: Deliver, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's own resolver and sockets: as Lambda's runtime API listens beside a function."""
    names = Network()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    with witnesses() as hosts:
        for host in hosts:
            names.names = {
                f"a{n}.example.com": [[each]]
                for n, each in enumerate(["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0"])  # noqa: S104
            } | {"localhost": [["127.0.0.1", "::1"]]}
            monkeypatch.setenv("AWS_LAMBDA_RUNTIME_API", f"127.0.0.1:{host.port}")
            forms = ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0", "[::1]", "[::]",  # noqa: S104
                     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "localhost", *names.names]  # fmt: skip
            for form in forms:
                for url in (
                    f"https://{form}:{host.port}/",
                    f"http://{form}:{host.port}/",
                    f"https://u:p@{form}:{host.port}/",
                ):
                    assert deliver(url) in (
                        "to be tried again", f"the address {PRIVATE}", "the address must start with https://",
                    ), url  # fmt: skip
        assert [host.connections for host in hosts] == [0] * len(hosts)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirect_of_a_receiver_is_not_followed(deliver: Deliver, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    # From a receiver that is allowed, to one that is on the same machine: nothing but the rule is in the way.
    with witnesses() as (host, *_), hostile_host({"": sends(b"")}) as receiver:
        for place in (f"{host.origin}/", f"//127.0.0.1:{host.port}/", "https://169.254.169.254/", "/again", ""):
            receiver.answers = {"": sends(head(f"Location: {place}", "Content-Length: 0", status=status))}
            with guarded_client(allowed_origins=[receiver.origin]) as client:
                assert client.post(receiver.origin).status_code == int(status[:3])
        assert receiver.connections == 5
        assert host.connections == 0


# -- output files -------------------------------------------------------------------------------------------------

Copy = Callable[[list[str]], list[str | None]]


@pytest.fixture
def file_host() -> Iterator[HostileHost]:
    with hostile_host({"": sends(whole(b"file"))}) as host:
        yield host


@pytest.fixture
def copy(cloud: None, clock: Clock, file_host: HostileHost, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """Copies the files of a prediction, the last time; the error of each, or None."""
    monkeypatch.setenv("FILE_ORIGINS", file_host.origin)
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("copy_outputs", template_only)
    bucket = OutputsBucket("outputs", [file_host.origin], sleep=lambda seconds: None)
    table = PredictionsTable("predictions", bucket, clients.client("dynamodb"))
    monkeypatch.setattr(app, "outputs", bucket)
    monkeypatch.setattr(app, "time", clock_module(clock.now))

    def copy(urls: list[str]) -> list[str | None]:
        prediction = put(table, clock)
        table.merge(prediction.id, told("succeeded", output=list(urls)), clock.now())
        clock.advance(2 * 3600)
        assert app.handler({"id": prediction.id, "execution": f"{prediction.id}-1"}, Context(800)) == {}
        found = table.read(prediction.id)
        assert found is not None
        assert len(found.files) == len(urls)
        return [file.error for file in found.files]

    return copy


def test_file_at_a_special_address_is_never_dialled(copy: Copy, network: Network) -> None:
    network.names = {f"a{n}.replicate.delivery": [[address]] for n, address in enumerate(ADDRESSES)}
    found = copy([f"https://{name}/out.png" for name in network.names])
    assert dict(zip(ADDRESSES, found, strict=True)) == dict.fromkeys(ADDRESSES, f"the file's address {PRIVATE}")
    assert network.dialled == []


def test_file_at_a_public_address_is_dialled_there_and_nowhere_else(copy: Copy, network: Network) -> None:
    network.names = {f"a{n}.replicate.delivery": [["10.0.0.1", address, "::1"]] for n, address in enumerate(PUBLIC)}
    found = copy([f"https://{name}/out.png" for name in network.names])
    assert set(found) == {"the connection to the file host failed (ConnectError), 3 times"}
    assert sorted(network.dialled) == sorted(PUBLIC * 3)


def test_redirect_of_a_file_leads_nowhere_else(
    copy: Copy, file_host: HostileHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = "the file host redirected to where files may not come from"
    invalid = ("is not valid", "(RemoteProtocolError), 3 times")  # what httpx takes for no URL at all
    names = Network()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    names.names = {f"a{n}.replicate.delivery": [[address]] for n, address in enumerate(ADDRESSES)}
    with witnesses() as hosts:
        ports = [host.port for host in hosts]
        places = {
            **{f"{scheme}//{bracketed(address)}/": elsewhere for address in ADDRESSES for scheme in ("https:", "http:", "")},
            **{f"http://{form}:{port}/": elsewhere for port in ports for form in (
                "127.0.0.1", "127.1", "2130706433", "0x7f.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0",  # noqa: S104
            )},
            **{f"https://{name}/": f"the file's address {PRIVATE}" for name in names.names},
            **{url: elsewhere for url, _ in REFUSED_URLS["schemes"] if "://" in url and not url.startswith("https:///")},
            **{url: elsewhere for url, _ in REFUSED_URLS["credentials"] + REFUSED_URLS["other notations of addresses"]},
            f"{file_host.origin}@127.0.0.1:{ports[0]}/": elsewhere,
            f"http://user@127.0.0.1:{file_host.port}/": elsewhere,
            f"https://127.0.0.1:{file_host.port}/": elsewhere,
            "https://replicate.delivery.example.com/": elsewhere,
            "https://replicate.delivery@169.254.169.254/": elsewhere,
            "https://replicate.delivery:8443/": elsewhere,
            "http://replicate.delivery/": elsewhere,
            "https://replicate.delivery\\@169.254.169.254/": elsewhere,
            "https://replicate.delivery#@169.254.169.254/": "the connection to the file host failed (ConnectError), 3 times",
        }  # fmt: skip
        file_host.answers = {
            f"/{n}": sends(
                head(f"Location: {place}", "Content-Length: 0", status=f"{(301, 302, 303, 307, 308)[n % 5]} x")
            )
            for n, place in enumerate(places)
        }
        found = copy([f"{file_host.origin}/{n}" for n in range(len(places))])
        wrong = {
            place: got
            for (place, wanted), got in zip(places.items(), found, strict=True)
            if got is None or (wanted not in got and not any(each in got for each in invalid))
        }
        assert wrong == {}
        assert [host.connections for host in hosts] == [0] * len(hosts)
    one_by_one = [request for request in file_host.asked if not request.startswith(b"GET /")]
    assert one_by_one == []

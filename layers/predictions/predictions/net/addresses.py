"""SSRF guard: which addresses of untrusted URLs may be contacted.

Two checks, both needed: `check_webhook_url` refuses a bad URL early, where its author still gets a clear error, and
`net.client.guarded_client` decides where the socket is opened. Only the second one is safe against names that resolve
to a private address, or to another address a moment later (DNS rebinding): it looks the name up itself and dials
exactly the address that it checked.

Hand-made: libraries against SSRF check a name and let the HTTP client resolve it again, or do not know IPv6.
"""

import ipaddress
import re
from urllib.parse import urlsplit

from predictions.errors import PredictionsError

WEBHOOK_URL_MAX_LENGTH = 2048

# https://www.iana.org/assignments/iana-ipv4-special-registry
# https://www.iana.org/assignments/iana-ipv6-special-registry
# Written out, because `ipaddress.is_global` has changed its results between Python releases.
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
    """A URL is refused; the message (`must start with https://`) is fit for anyone."""


def is_public(address: str) -> bool:
    """Return whether an IP address, in its usual notation, is on the public Internet.

    Everything of the special-purpose registries is not public, nor are IPv6 addresses that carry an IPv4
    address: what those lead to depends on a gateway. A text that is no IP address is not public either.
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
    """Refuse an unusable webhook URL, as far as that shows without a name lookup.

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

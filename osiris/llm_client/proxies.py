"""Proxies from the environment.

`HTTP_PROXY`, `HTTPS_PROXY` or `ALL_PROXY` is the proxy, `NO_PROXY` lists the hosts that need none.
The lower-case name has priority over the upper-case one. They are read once, when a client is
created. httpx reads the same variables, but if it does not understand the value of any of them, no
client can be created, even one that needs no proxy.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn, TypeVar

import httpx

from osiris.llm_client.errors import LLMClientConnectionError

PORTS: Final = {"http": 80, "https": 443}

Transport = TypeVar("Transport", httpx.HTTPTransport, httpx.AsyncHTTPTransport)


@dataclass(frozen=True)
class Proxy:
    """A proxy: its variable, and the value, which may contain a password."""

    variable: str
    value: str = field(repr=False)


class Unreachable(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A transport on which every request raises `LLMClientConnectionError` with a reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def handle_request(self, request: httpx.Request) -> NoReturn:
        """Raises the error."""
        raise LLMClientConnectionError(self._reason)

    async def handle_async_request(self, request: httpx.Request) -> NoReturn:
        """Raises the error."""
        raise LLMClientConnectionError(self._reason)


def transport_to(
    url: httpx.URL, proxy: Proxy | None, make: Callable[..., Transport]
) -> Transport | Unreachable:
    """A transport from `make`, or one that raises a clear error for each request."""
    without = f"To reach {url.host} without a proxy, add it to NO_PROXY."
    address = None
    if proxy is not None:
        address = _address(proxy)
        if address is None:
            return Unreachable(
                f"{proxy.variable} is not a URL of a proxy: it takes http://HOST:PORT, https:// or"
                f" socks5://. {without}"
            )
    # A plain HTTP server needs no certificates, so an invalid SSL_CERT_FILE does not matter.
    verify = url.scheme == "https" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return make(verify=verify, proxy=address)
    except ImportError:
        assert proxy is not None
        return Unreachable(
            f"{proxy.variable} names a SOCKS proxy, which needs the package socksio: pip install"
            f" 'httpx[socks]'. {without}"
        )
    except OSError:
        return Unreachable(
            "The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read."
        )


def proxy_for(url: httpx.URL) -> Proxy | None:
    """The proxy for a URL, from the environment; None for a direct connection.

    As with curl and httpx, a loopback host also needs `NO_PROXY`.
    """
    proxies = urllib.request.getproxies_environment()
    kind = next((kind for kind in (url.scheme, "all") if proxies.get(kind, "").strip()), None)
    if kind is None or _without_proxy(url, proxies.get("no", "")):
        return None
    value = proxies[kind]
    names = (name for name, found in os.environ.items() if found == value)
    return Proxy(next(name for name in names if name.lower() == f"{kind}_proxy"), value)


def parse_url(text: str) -> httpx.URL | None:
    """Parses a URL; None if its host or port is not valid for a connection."""
    try:
        url = httpx.URL(text)
        # A name lookup does this first, and httpx does not catch its error.
        url.raw_host.decode("ascii").encode("idna")
        known = url.host != "" and (url.port is None or 0 < url.port < 65536)
    except (ValueError, TypeError, httpx.InvalidURL):
        return None
    return url if known else None


def _address(proxy: Proxy) -> httpx.URL | None:
    value = proxy.value.strip()
    url = parse_url(value if "://" in value else f"http://{value}")
    return url if url and url.scheme in ("http", "https", "socks5", "socks5h") else None


def _without_proxy(url: httpx.URL, no_proxy: str) -> bool:
    """Whether `NO_PROXY` contains the host of a URL.

    Its entries are separated by commas or spaces: `*`, a name (including its subdomains; it may
    begin with a dot or `*.`), an address, or a network such as 10.0.0.0/8. IPv6 addresses may be in
    brackets. A name or an address with a port matches only this port.
    """
    port = url.port or PORTS[url.scheme]
    # An internationalised name has two forms, and either may be in NO_PROXY.
    hosts = (url.host.rstrip("."), url.raw_host.decode("ascii").rstrip("."))
    entries = re.split(r"[\s,]+", no_proxy.lower())
    return any(_matches(entry, host, port) for entry in entries for host in hosts)


def _matches(entry: str, host: str, port: int) -> bool:
    entry = entry.rpartition("://")[2]
    if entry == "*":
        return True
    named, its_port = entry, ""
    # A second colon outside brackets belongs to an IPv6 address.
    if found := re.fullmatch(r"(\[[^\]]*\]|[^:]*):([0-9]+)", entry):
        named, its_port = found.groups()
    if its_port not in ("", str(port)):
        return False
    named = re.sub(r"[\[\]]", "", named)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = named.removeprefix("*").strip(".")
        return f".{host}".endswith(f".{name}")
    try:
        return address in ipaddress.ip_network(named, strict=False)
    except ValueError:
        return False

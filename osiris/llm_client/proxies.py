"""How a client reaches its server: directly, or through the proxy that the environment names.

`HTTP_PROXY`, `HTTPS_PROXY` or `ALL_PROXY` names the proxy, `NO_PROXY` the hosts that are reached
directly; the lower-case name wins over the upper-case one. They are read once, when a client is
made. httpx reads the same variables, but then no client can be made where one of them has a value
that httpx does not understand, even if the client needs no proxy.
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
    """A proxy: the variable that names it, and its value, which may hold a password."""

    variable: str
    value: str = field(repr=False)


class Unreachable(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Carries no request: each one raises `LLMClientConnectionError`, which says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def handle_request(self, request: httpx.Request) -> NoReturn:
        """Raise the error."""
        raise LLMClientConnectionError(self._reason)

    async def handle_async_request(self, request: httpx.Request) -> NoReturn:
        """Raise the error."""
        raise LLMClientConnectionError(self._reason)


def transport_to(
    url: httpx.URL, proxy: Proxy | None, make: Callable[..., Transport]
) -> Transport | Unreachable:
    """A transport that `make` makes, or one that raises a clear error for each request."""
    without = f"To reach {url.host} without a proxy, add it to NO_PROXY."
    address = None
    if proxy is not None:
        address = _address(proxy)
        if address is None:
            return Unreachable(
                f"{proxy.variable} is no URL of a proxy: it takes http://HOST:PORT, https:// or"
                f" socks5://. {without}"
            )
    # A plain HTTP server needs no certificates, so a bad SSL_CERT_FILE does not matter.
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
    """The proxy that the environment names for a URL; None where it is reached directly.

    A loopback host goes through the proxy too, as with curl and httpx, unless `NO_PROXY` has it.
    """
    proxies = urllib.request.getproxies_environment()
    kind = next((kind for kind in (url.scheme, "all") if proxies.get(kind, "").strip()), None)
    if kind is None or _without_proxy(url, proxies.get("no", "")):
        return None
    value = proxies[kind]
    names = (name for name, found in os.environ.items() if found == value)
    return Proxy(next(name for name in names if name.lower() == f"{kind}_proxy"), value)


def parse_url(text: str) -> httpx.URL | None:
    """A URL that a connection can be made to; None where its host or port cannot be."""
    try:
        url = httpx.URL(text)
        # What a name lookup does first. httpx does not catch its error.
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
    """Whether `NO_PROXY` has the host of a URL.

    Its entries stand between commas or spaces: `*`, a name (with all names below it, also when it
    begins with a dot or `*.`), an address, or a network such as 10.0.0.0/8. IPv6 addresses may be
    in brackets; a name or an address may have a port, and is then for this port only.
    """
    port = url.port or PORTS[url.scheme]
    # A name with other than ASCII letters may be written in either form.
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

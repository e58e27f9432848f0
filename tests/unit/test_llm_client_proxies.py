"""The proxy of a client in each environment, and the error for an unusable proxy."""

from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from osiris.llm_client import AsyncLLMClient, LLMClient, LLMClientConnectionError
from osiris.llm_client.proxies import Proxy, proxy_for, transport_to

PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def variable(url: str, monkeypatch: pytest.MonkeyPatch, **environ: str) -> str | None:
    """The variable whose proxy a client of this URL uses in this environment."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    proxy = proxy_for(httpx.URL(url))
    return None if proxy is None else proxy.variable


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("http://h", {}, None),
        ("http://h", {"HTTP_PROXY": PROXY}, "HTTP_PROXY"),
        ("http://h", {"http_proxy": PROXY}, "http_proxy"),
        ("http://h", {"HTTP_PROXY": "http://other", "http_proxy": PROXY}, "http_proxy"),
        # An empty lower-case variable switches the upper-case one off, as with curl.
        ("http://h", {"HTTP_PROXY": PROXY, "http_proxy": ""}, None),
        ("http://h", {"HTTP_PROXY": " "}, None),
        ("http://h", {"HTTPS_PROXY": PROXY}, None),
        ("https://h", {"HTTPS_PROXY": PROXY}, "HTTPS_PROXY"),
        ("https://h", {"HTTP_PROXY": PROXY}, None),
        ("https://h", {"ALL_PROXY": PROXY}, "ALL_PROXY"),
        ("http://h", {"ALL_PROXY": "http://other", "HTTP_PROXY": PROXY}, "HTTP_PROXY"),
        ("http://h", {"all_proxy": PROXY, "HTTP_PROXY": ""}, "all_proxy"),
        # A CGI script gets a header `Proxy:` of its caller's as HTTP_PROXY.
        ("http://h", {"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, None),
        ("http://localhost:8000", {"HTTP_PROXY": PROXY}, "HTTP_PROXY"),
        ("http://127.0.0.1:8000", {"HTTP_PROXY": PROXY}, "HTTP_PROXY"),
    ],
)
def test_the_environment_names_the_proxy(
    url: str, environ: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variable(url, monkeypatch, **environ) == expected


@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://h", "*"),
        ("http://h", "other, *"),
        ("http://localhost:8000", "localhost"),
        ("http://localhost:8000", "LOCALHOST"),
        ("http://LOCALHOST:8000", "localhost"),
        ("http://localhost.:8000", "localhost"),
        ("http://localhost:8000", "localhost."),
        ("http://bücher.example.", "bücher.example"),
        ("http://bücher.example.", "xn--bcher-kva.example"),
        ("http://localhost:8000", " other ,\tlocalhost "),
        ("http://localhost:8000", "other localhost"),
        ("http://localhost:8000", "localhost:8000"),
        ("http://h", "h:80"),
        ("https://h", "h:443"),
        ("https://h", "http://h"),
        ("http://desk.example", "example"),
        ("http://desk.example", ".example"),
        ("http://desk.example", "*.example"),
        ("http://desk.example", "*desk.example"),
        ("http://example", ".example"),
        ("http://a.b.example:9", ".example:9"),
        ("http://bücher.example", "bücher.example"),
        ("http://bücher.example", "xn--bcher-kva.example"),
        ("http://127.0.0.1:8000", "127.0.0.1"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000", "127.0.0.0/8"),
        ("http://127.0.0.1:8000", "127.9.9.9/8"),
        ("http://10.1.2.3", "localhost,10.0.0.0/8,fe80::/10"),
        ("http://[::1]:8000", "::1"),
        ("http://[::1]:8000", "[::1]"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("http://[::1]:8000", "0:0:0:0:0:0:0:1"),
        ("http://[fe80::1]", "fe80::/10"),
        ("http://[fe80::1]", "[fe80::]/10"),
    ],
)
def test_a_host_of_no_proxy_is_reached_directly(
    url: str, no_proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variable(url, monkeypatch, ALL_PROXY=PROXY, NO_PROXY=no_proxy) is None


@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://h", ""),
        ("http://h", " , "),
        ("http://h", "."),
        ("http://h", "*."),
        ("http://xxxx", ""),
        ("http://localhost:8000", "localhost:8001"),
        ("http://localhost:8000", "local"),
        ("http://localhost:8000", "host"),
        ("http://wwwexample", "example"),
        ("http://example", "desk.example"),
        ("http://127.0.0.1:8000", "localhost"),
        ("http://127.0.0.1", "0.0.1"),
        ("http://127.0.0.1", ".1"),
        ("http://11.0.0.1", "10.0.0.0/8"),
        ("http://11.0.0.1", "::/0"),
        ("http://10.0.0.1", "10.0.0.0/99"),
        ("http://[::1]:8000", "[::1]:8001"),
        ("http://[::1]:8000", "::"),
        ("http://[2001:db8::1]", "fe80::/10"),
        ("http://[::1]", "["),
    ],
)
def test_another_host_goes_through_the_proxy(
    url: str, no_proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variable(url, monkeypatch, ALL_PROXY=PROXY, NO_PROXY=no_proxy) == "ALL_PROXY"


UNUSABLE = [
    "ftp://me:hunter2@h:1",
    "socks4://me:hunter2@h:1",
    "http://me:hunter2@",
    "http://me:hunter2@h:port",
    "http://me:hunter2@h:0",
    "http://me:hunter2@h:70000",
    "http://me:hunter2@[::1",
    "http://me:hunter2@a..b",
    "http://me:hunter2@xn--a",
    "http://me:hunter2@h\x7f",
    "http://me:hunter2@\udcff",
    "://me:hunter2",
]


@pytest.mark.parametrize("value", UNUSABLE)
async def test_an_invalid_proxy_is_an_error_of_the_first_request(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    expected = (
        "HTTP_PROXY is not a URL of a proxy: it takes http://HOST:PORT, https:// or socks5://."
        " To reach sidecar without a proxy, add it to NO_PROXY."
    )
    with LLMClient("http://sidecar:8000", sleep=_never) as client:
        for ask in (client.health, client.ready, lambda: next(client.stream_audio())):
            with pytest.raises(LLMClientConnectionError) as caught:
                ask()
            assert str(caught.value) == expected
    async with AsyncLLMClient("http://sidecar:8000", sleep=_never) as async_client:
        with pytest.raises(LLMClientConnectionError) as caught:
            await async_client.health()
        assert str(caught.value) == expected


@pytest.mark.parametrize("value", ["socks5://me:hunter2@h:1080", "socks5h://me:hunter2@h"])
def test_a_socks_proxy_says_which_package_it_needs(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("all_proxy", value)
    with LLMClient("https://sidecar") as client, pytest.raises(LLMClientConnectionError) as caught:
        client.health()
    assert str(caught.value) == (
        "all_proxy names a SOCKS proxy, which needs the package socksio:"
        " pip install 'httpx[socks]'. To reach sidecar without a proxy, add it to NO_PROXY."
    )


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("proxy.example:3128", "http://proxy.example:3128"),
        (" http://proxy.example:3128 ", "http://proxy.example:3128"),
        ("https://me:hunter2@proxy.example", "https://me:hunter2@proxy.example"),
        ("socks5://proxy.example:1", "socks5://proxy.example:1"),
        ("socks5h://proxy.example:65535", "socks5h://proxy.example:65535"),
    ],
)
def test_the_connections_go_through_the_proxy(value: str, address: str) -> None:
    made: list[httpx.URL | None] = []

    def make(*, verify: object, proxy: httpx.URL | None) -> httpx.HTTPTransport:
        made.append(proxy)
        return httpx.HTTPTransport(verify=False)

    transport_to(httpx.URL("http://h"), Proxy("HTTP_PROXY", value), make)
    transport_to(httpx.URL("http://h"), None, make)
    assert made == [httpx.URL(address), None]


def test_a_server_must_show_a_certificate() -> None:
    made: list[object] = []

    def make(*, verify: object, proxy: httpx.URL | None) -> httpx.HTTPTransport:
        made.append(verify)
        return httpx.HTTPTransport(verify=False)

    for url in ("https://h", "http://h"):
        transport_to(httpx.URL(url), None, make)
    https, http = made
    assert https is True
    # It trusts no certificate, and none is shown.
    assert isinstance(http, ssl.SSLContext)
    assert (http.verify_mode, http.get_ca_certs()) == (ssl.CERT_REQUIRED, [])


def test_a_bad_proxy_for_another_scheme_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "broken://")
    monkeypatch.setenv("ALL_PROXY", "broken://")
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    assert variable("http://h", monkeypatch) == "HTTP_PROXY"


def test_a_given_transport_uses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "broken://")
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"by": "hand"}))
    with LLMClient("http://sidecar", transport=transport) as client:
        assert client.health() == {"by": "hand"}


def test_certificates_that_cannot_be_read_are_an_error_of_the_first_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with LLMClient("https://sidecar") as client, pytest.raises(LLMClientConnectionError) as caught:
        client.health()
    assert str(caught.value) == (
        "The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read."
    )


def _never(seconds: float) -> Any:
    raise AssertionError("a request that cannot succeed is tried again")

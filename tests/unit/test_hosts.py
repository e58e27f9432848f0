"""Allowed hosts: which names of the server requests may use."""

from __future__ import annotations

import pytest

from llm_sidecar.settings import Settings
from osiris.middleware.hosts import AllowedHosts
from osiris.server import create_app
from tests.unit.asgi import Call, Inner, client, http_scope

ALLOWED = ("localhost", "127.0.0.1", "::1", "*.desk.example")


async def status_for(*hosts: bytes, path: str = "/generate/") -> int:
    call = Call()
    headers = [(b"host", host) for host in hosts]
    app = AllowedHosts(Inner(), ALLOWED)
    await app(http_scope(path, headers=headers), call.receive, call.send)
    return call.status


@pytest.mark.parametrize(
    "host",
    [
        b"localhost",
        b"localhost:8000",
        b"LocalHost.",
        b"127.0.0.1:1",
        b"[::1]",
        b"[::1]:8000",
        b"[0:0:0:0:0:0:0:1]",
        b"a.desk.example",
        b"a.b.desk.example:443",
    ],
)
async def test_an_allowed_host_is_answered(host: bytes) -> None:
    assert await status_for(host) == 200


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b"evil.example",
        b"localhost.evil.example",
        b"evillocalhost",
        b"desk.example",
        b"evildesk.example",
        b"127.0.0.2",
        b"[::2]",
        b"localhost@evil.example",
        b"localhost, evil.example",
        b"localhost:80:80",
        b"\xff",
    ],
)
async def test_any_other_host_is_400(host: bytes) -> None:
    assert await status_for(host) == 400


async def test_no_host_and_two_hosts_are_400() -> None:
    assert await status_for() == 400
    assert await status_for(b"localhost", b"localhost") == 400


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready/", "/metrics"])
async def test_probes_and_metrics_are_answered_under_any_host(path: str) -> None:
    assert await status_for(b"10.1.2.3:8000", path=path) == 200


async def test_an_asterisk_allows_every_host() -> None:
    call = Call()
    await AllowedHosts(Inner(), ["*"])(http_scope("/"), call.receive, call.send)
    assert call.status == 200


async def test_the_refusal_names_header_and_variable_but_not_the_host() -> None:
    environ = {"ALLOWED_HOSTS": "localhost", "CORS_ORIGINS": "https://desk.example"}
    app = create_app(Settings.from_environ(environ))
    headers = {"Host": "evil.example", "Origin": "https://desk.example", "X-Request-ID": "r-1"}
    async with client(app) as asking:
        response = await asking.get("/examples/", headers=headers)
    assert response.status_code == 400
    assert response.json() == {
        "detail": "Host: this host name is not allowed; use one that is in ALLOWED_HOSTS, or add "
        "this one to it."
    }
    assert response.headers["X-Request-ID"] == "r-1"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Access-Control-Allow-Origin"] == "https://desk.example"

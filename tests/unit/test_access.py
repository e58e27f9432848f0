"""API keys: which requests they admit, and how the others are refused."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from llm_sidecar.api_keys import ApiKey
from osiris.middleware.access import ApiKeys, Caller, caller
from tests.unit.asgi import Call, Inner, client, http_scope

ONE, TWO = "first-key-0123456789", "second-key-012345678"
REFUSED = {
    "detail": (
        "This needs a valid API key: send it as Authorization: Bearer KEY, or as X-API-Key: KEY."
    )
}


def guarded(*, metrics_need_key: bool = False) -> tuple[ApiKeys, Inner]:
    inner = Inner()
    keys = [ApiKey(SecretStr(ONE)), ApiKey(SecretStr(TWO), "desk")]
    return ApiKeys(inner, keys, metrics_need_key), inner


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ONE}"},
        {"Authorization": f"Bearer {TWO}"},
        {"Authorization": f"bearer  {TWO} "},
        {"AUTHORIZATION": f"BEARER {ONE}"},
        {"X-API-Key": ONE},
        {"x-api-key": TWO},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {ONE}"},
        {"X-API-Key": ONE, "Authorization": "Bearer wrong"},
        {"X-API-Key": ONE, "Authorization": "Basic dXNlcg=="},
    ],
)
async def test_every_key_is_accepted_in_every_header(headers: dict[str, str]) -> None:
    app, inner = guarded()
    async with client(app) as asking:
        response = await asking.post("/generate/", json={"prompt": "x"}, headers=headers)
    assert (response.status_code, response.text) == (200, "inner")
    assert [scope["path"] for scope in inner.scopes] == ["/generate/"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {ONE}"},
        {"Authorization": ONE},
        {"Authorization": f" {ONE}"},
        {"Authorization": f"Bearer {ONE}x"},
        {"Authorization": f"Bearer {ONE[:-1]}"},
        {"Authorization": f"Bearer {ONE.upper()}"},
        {"Authorization": f"Bearer {ONE},{TWO}"},
        {"Authorization": f"Bearer {ONE} {TWO}"},
        {"X-API-Key": ""},
        {"X-API-Key": f"Bearer {ONE}"},
        {"X-API-Key": b"\xff\xfe"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Cookie": ONE},
    ],
)
async def test_anything_else_is_401(headers: dict[str, str]) -> None:
    app, inner = guarded()
    async with client(app) as asking:
        response = await asking.post("/generate/", json={"prompt": "x"}, headers=headers)
    assert response.status_code == 401
    assert response.json() == REFUSED
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="sidecar"'
    assert inner.scopes == []


@pytest.mark.parametrize("path", ["/generate/", "/health", "/metrics"])
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-API-Key": ONE}, Caller("#1", None)),
        ({"X-API-Key": TWO}, Caller("desk", "desk")),
        ({"Authorization": f"Bearer {TWO}"}, Caller("desk", "desk")),
    ],
)
async def test_the_app_gets_the_caller_of_the_key(
    path: str, headers: dict[str, str], expected: Caller
) -> None:
    app, inner = guarded()
    async with client(app) as asking:
        assert (await asking.get(path, headers=headers)).status_code == 200
    assert [caller(scope) for scope in inner.scopes] == [expected]


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "wrong"}])
async def test_an_open_path_without_a_valid_key_has_no_caller(headers: dict[str, str]) -> None:
    app, inner = guarded()
    async with client(app) as asking:
        assert (await asking.get("/health", headers=headers)).status_code == 200
    assert [caller(scope) for scope in inner.scopes] == [None]


async def test_a_key_need_not_be_ascii() -> None:
    inner = Inner()
    app = ApiKeys(inner, [ApiKey(SecretStr("schlüssel-von-uns"))], metrics_need_key=False)
    async with client(app) as asking:
        # A header is bytes, which ASGI apps read as Latin-1; the key is UTF-8.
        sent = {b"X-API-Key": "schlüssel-von-uns".encode()}
        assert (await asking.get("/examples/", headers=sent)).status_code == 200


async def test_a_refusal_reads_no_body() -> None:
    app, _ = guarded()
    call = Call()
    # There is no message, so receiving would fail.
    await app(http_scope("/generate/"), call.receive, call.send)
    assert call.status == 401


@pytest.mark.parametrize("path", ["/health", "/health/", "/health/live", "/health/ready"])
@pytest.mark.parametrize("metrics_need_key", [False, True])
async def test_the_probes_need_no_key(path: str, metrics_need_key: bool) -> None:
    app, _ = guarded(metrics_need_key=metrics_need_key)
    async with client(app) as asking:
        assert (await asking.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/docs/", "/docs/x/init.js", "/openapi.json/"])
async def test_the_documentation_needs_no_key(path: str) -> None:
    app, _ = guarded(metrics_need_key=True)
    async with client(app) as asking:
        assert (await asking.get(path)).status_code == 200


@pytest.mark.parametrize(("metrics_need_key", "status"), [(False, 200), (True, 401)])
async def test_the_metrics_need_a_key_only_if_configured(
    metrics_need_key: bool, status: int
) -> None:
    app, _ = guarded(metrics_need_key=metrics_need_key)
    async with client(app) as asking:
        for path in ("/metrics", "/metrics/"):
            assert (await asking.get(path)).status_code == status
            shown = await asking.get(path, headers={"X-API-Key": ONE})
            assert shown.status_code == 200


async def test_an_admitted_request_keeps_its_body() -> None:
    app, inner = guarded()
    call = Call()
    await app(http_scope("/health"), call.receive, call.send)
    assert inner.receivers == [call.receive]


@pytest.mark.parametrize("path", ["/", "/docsx", "/openapi.jsonx", "/stream/audio", "/healthy"])
async def test_every_other_path_needs_a_key(path: str) -> None:
    app, _ = guarded()
    async with client(app) as asking:
        assert (await asking.get(path)).status_code == 401


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_only_http_needs_a_key(kind: str) -> None:
    app, inner = guarded()
    call = Call()
    scope = http_scope("/generate/", type=kind)
    await app(scope, call.receive, call.send)
    assert (inner.scopes, inner.receivers) == ([scope], [call.receive])
    assert call.body == b"inner"

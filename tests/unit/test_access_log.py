"""The access log: the caller in each line, and request ids in the other lines."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_sidecar.api_keys import ApiKey
from llm_sidecar.logs import TextFormatter, log_context, start_detached, start_owned
from osiris import logs
from osiris.middleware.access import ApiKeys
from osiris.middleware.access_log import AccessLog
from osiris.middleware.request_id import RequestId
from tests.unit.asgi import Call, Inner, http_scope

ONE, TWO = "first-key-0123456789", "second-key-012345678"
KEYS = [ApiKey(SecretStr(ONE)), ApiKey(SecretStr(TWO), "desk")]


async def line(
    caplog: pytest.LogCaptureFixture,
    client: tuple[str, int] | None = ("203.0.113.7", 4711),
    key: str | None = TWO,
    keys: list[ApiKey] = KEYS,
) -> tuple[dict[str, Any], str]:
    """The fields about the caller and the text of the line of one request."""
    app: ASGIApp = Inner()
    if keys:
        app = ApiKeys(app, keys, metrics_need_key=False)
    app = AccessLog(app, lambda: {"/generate": "/generate/"})
    headers = [] if key is None else [(b"x-api-key", key.encode())]
    call = Call()
    with caplog.at_level(logging.INFO, "osiris.access"):
        await app(http_scope("/generate/", client=client, headers=headers), call.receive, call.send)
    (record,) = caplog.records
    assert ONE not in caplog.text
    assert TWO not in caplog.text
    fields = {name: vars(record)[name] for name in ("client", "key") if hasattr(record, name)}
    return fields, TextFormatter().format(record).rpartition(" ms")[2]


@pytest.mark.parametrize(
    ("key", "shown"), [(TWO, "desk"), (ONE, "#1")], ids=["a name", "a position"]
)
async def test_a_line_has_the_address_of_the_client_and_the_name_of_the_key(
    caplog: pytest.LogCaptureFixture, key: str, shown: str
) -> None:
    fields, text = await line(caplog, key=key)
    assert fields == {"client": "203.0.113.7", "key": shown}
    assert text == f" for 203.0.113.7 with key {shown}"


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_a_refused_request_has_an_address_and_no_key(
    caplog: pytest.LogCaptureFixture, key: str | None
) -> None:
    fields, text = await line(caplog, key=key)
    assert caplog.records[0].status == 401  # type: ignore[attr-defined]
    assert (fields, text) == ({"client": "203.0.113.7"}, " for 203.0.113.7")


async def test_without_configured_keys_there_is_no_key(caplog: pytest.LogCaptureFixture) -> None:
    assert await line(caplog, keys=[]) == ({"client": "203.0.113.7"}, " for 203.0.113.7")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1%a zone may be any text", "fe80::1"),
        # A trusted proxy may forward any text of its client.
        ("1.2.3.4 with key admin", "unknown"),
        ("", "unknown"),
    ],
)
async def test_an_address_that_is_not_an_ip_address_is_not_logged(
    caplog: pytest.LogCaptureFixture, host: str, shown: str
) -> None:
    fields, _ = await line(caplog, client=(host, 0))
    assert fields["client"] == shown


async def test_a_client_on_a_unix_socket_has_no_address(caplog: pytest.LogCaptureFixture) -> None:
    assert await line(caplog, client=None) == ({"key": "desk"}, " with key desk")


# Request ids in log lines


class App:
    """Leaves a context that outlives its request, as connections and background tasks do.

    Attributes:
        inside: the id that the request's own code logs with.
        left: contexts in which something runs later.
    """

    def __init__(self) -> None:
        self.inside: list[str | None] = []
        self.left: list[contextvars.Context] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.inside.append(current_id())
        self.left.append(contextvars.copy_context())
        if scope["path"] == "/wait":
            await asyncio.Event().wait()
        if scope["path"] == "/fail":
            raise ZeroDivisionError
        await Inner()(scope, receive, send)


def current_id() -> str | None:
    return log_context.get().get("request_id")


async def ask(app: ASGIApp, path: str, request_id: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
        return await asking.get(path, headers={"X-Request-ID": request_id})


async def test_consecutive_requests_have_different_ids() -> None:
    app = App()
    served = RequestId(app)
    await ask(served, "/", "one")
    assert current_id() is None
    await ask(served, "/", "two")
    assert app.inside == ["one", "two"]


@pytest.mark.parametrize("path", ["/", "/wait", "/fail"])
async def test_work_that_outlives_a_request_does_not_log_its_id(path: str) -> None:
    app = App()
    asking = asyncio.create_task(ask(RequestId(app), path, "one"))
    while not app.left:
        await asyncio.sleep(0)
    if path == "/wait":
        assert app.left[0].run(current_id) == "one"
        asking.cancel()
    await asyncio.wait([asking])
    # The callbacks of a finished task run one turn later.
    await asyncio.sleep(0)
    assert app.left[0].run(current_id) is None


async def test_the_line_of_the_server_about_an_error_has_the_request_id() -> None:
    async def server() -> str | None:
        with pytest.raises(ZeroDivisionError):
            await RequestId(App())(
                http_scope("/fail", headers=[(b"x-request-id", b"one")]),
                Call().receive,
                Call().send,
            )
        return current_id()

    assert await asyncio.create_task(server()) == "one"


async def test_owned_work_keeps_the_request_id_and_detached_work_has_none() -> None:
    ended = asyncio.Event()
    left: list[contextvars.Context] = []

    async def later() -> str | None:
        left.append(contextvars.copy_context())
        await ended.wait()
        return current_id()

    fields = {"request_id": "one"}
    token = log_context.set(fields)
    owned, detached = start_owned(later()), start_detached(later())
    log_context.reset(token)
    fields.clear()
    ended.set()
    assert (await owned, await detached) == ("one", None)
    await asyncio.sleep(0)
    assert left[0].run(current_id) is None


@pytest.mark.parametrize(
    ("configured", "access", "turned_off"),
    [(True, True, False), (True, False, True), (False, False, False)],
)
def test_only_uvicorn_with_its_option_turns_the_lines_off(
    monkeypatch: pytest.MonkeyPatch, configured: bool, access: bool, turned_off: bool
) -> None:
    handler = logging.NullHandler()
    for name, has_one in (("uvicorn", configured), ("uvicorn.access", access)):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler] * has_one)
    assert logs._is_turned_off() is turned_off

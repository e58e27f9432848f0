"""One `X-Request-ID` in a response."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osiris.middleware.request_id import is_request_id


class WithoutRequestId:
    """Removes `X-Request-ID` from the responses, because the proxy of Ray Serve adds it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                message["headers"] = [one for one in headers if one[0].lower() != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)


class WithoutBadRequestId:
    """Removes an `X-Request-ID` that is not well-formed from the requests, because the proxy of Ray
    Serve would echo it. The proxy then makes an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            if not is_request_id(headers.get("x-request-id", "")):
                del headers["x-request-id"]
        await self._app(scope, receive, send)


def in_proxy() -> list[Middleware]:
    """The middleware of the proxy: Ray calls the function that its variable
    `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names."""
    return [Middleware(WithoutBadRequestId)]

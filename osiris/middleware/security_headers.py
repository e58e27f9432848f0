"""Response headers that protect browsers."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    # HTML pages send another policy.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class SecurityHeaders:
    """Tells browsers not to cache, guess content types or embed; keeps headers that the answer
    already has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                # ASGI's names are in lower case. Starlette's `Headers` would search the list each
                # time.
                headers = dict(message["headers"])
                message["headers"] = [
                    *message["headers"],
                    *(header for header in _HEADERS if header[0] not in headers),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)

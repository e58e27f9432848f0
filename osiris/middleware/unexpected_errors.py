"""The answer to an error that nothing else has answered."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from llm_sidecar.telemetry.asgi import TrackedSend
from osiris.refusals import refusal


class UnexpectedErrors:
    """Answers 500 to an error that nothing else has answered, and raises it again.

    Starlette's own answer would be outside of all middleware, and lack their headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = TrackedSend(send)
        try:
            await self._app(scope, receive, response)
        except Exception:
            if scope["type"] == "http" and not response.started:
                await refusal(scope, 500, unexpected_detail(scope))(scope, receive, send)
            raise


def unexpected_detail(scope: Scope) -> str:
    """The message to the client for an unexpected error."""
    return f"An unexpected error occurred; the log has it under {scope['state']['request_id']}."

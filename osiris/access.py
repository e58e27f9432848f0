"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from osiris.paths import is_documentation, is_metrics, is_probe

_DETAIL: Final = (
    "This needs an API key that the server knows: send it as Authorization: Bearer KEY, or as "
    "X-API-Key: KEY."
)


class ApiKeys:
    """Answers 401 to whoever shows none of the keys, before the body is read.

    The probes and the documentation are open to everybody, and so are the metrics unless
    `metrics_need_key`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr], metrics_need_key: bool) -> None:
        self._app = app
        # Hashes have one length, so that a comparison does not tell how long a key is.
        self._keys = [_hash(key.get_secret_value().encode()) for key in keys]
        self._metrics_need_key = metrics_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refusal = JSONResponse(
            {"detail": _DETAIL},
            status_code=401,
            headers={"WWW-Authenticate": 'Bearer realm="sidecar"'},
        )
        await refusal(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if is_metrics(scope):
            return not self._metrics_need_key
        return is_probe(scope) or is_documentation(scope)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        shown = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            shown.append(token.strip())
        # Every key is compared with, so that the time does not tell which one it was.
        matches = [
            hmac.compare_digest(_hash(key.encode("latin-1")), known)
            for key in shown
            for known in self._keys
        ]
        return any(matches)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

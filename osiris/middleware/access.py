"""API keys: authentication of requests, and the keys' names for the log and for feedback."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_sidecar.api_keys import ApiKey
from osiris.paths import is_documentation, is_metrics, is_probe
from osiris.refusals import refusal

_DETAIL: Final = (
    "This needs a valid API key: send it as Authorization: Bearer KEY, or as X-API-Key: KEY."
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The key of a request.

    Attributes:
        label: for the log: the key's name, or `#` and its position in the setting, counted from 1.
        name: the key's name; None for a key without one.
    """

    label: str
    name: str | None


def caller(scope: Mapping[str, Any]) -> Caller | None:
    """The valid key of a request; None without one, and if no keys are configured."""
    found: Caller | None = scope.get("state", {}).get("caller")
    return found


async def _author(request: Request) -> str | None:
    known = caller(request.scope)
    return None if known is None else known.name


Author = Annotated[str | None, Depends(_author)]
"""The name of the request's key, for a route's parameter; None for a key without a name."""


class ApiKeys:
    """Answers 401 to a request without a valid key, before its body is read.

    The probes and the documentation need no key. Neither do the metrics, unless `metrics_need_key`.
    `caller` returns the key of a request.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], metrics_need_key: bool) -> None:
        self._app = app
        # Hashes have the same length, so that comparing them does not reveal the length of a key.
        self._keys = [
            (_hash(key.secret.get_secret_value().encode()), Caller(key.name or f"#{n}", key.name))
            for n, key in enumerate(keys, 1)
        ]
        self._metrics_need_key = metrics_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        known = self._find(Headers(scope=scope))
        if known is not None:
            scope.setdefault("state", {})["caller"] = known
        if known is not None or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        challenge = {"WWW-Authenticate": 'Bearer realm="sidecar"'}
        await refusal(scope, 401, _DETAIL, challenge)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if is_metrics(scope):
            return not self._metrics_need_key
        return is_probe(scope) or is_documentation(scope)

    def _find(self, headers: Headers) -> Caller | None:
        sent = []
        if key := headers.get("x-api-key"):
            sent.append(key)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            sent.append(token.strip())
        # All keys are compared, so that the time does not reveal which one matched.
        matches = [
            known
            for digest in [_hash(key.encode("latin-1")) for key in sent]
            for key_digest, known in self._keys
            if hmac.compare_digest(digest, key_digest)
        ]
        return matches[0] if matches else None


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

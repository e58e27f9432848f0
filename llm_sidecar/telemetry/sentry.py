"""Sentry: unexpected errors and the deaths of workers, without any text of a request or a model.

    sentry = Sentry("https://key@sentry.example/1", "production", 0.0)
    sentry.install(app)
    sentry.start()

Only allowed fields are sent (`telemetry.sentry_events`), so that fields which a newer SDK adds
never leave the process. Errors of `llm_sidecar.errors` are answers, not events.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sentry_sdk
from sentry_sdk.utils import event_from_exception

from llm_sidecar.telemetry.asgi import is_observed, known_method
from llm_sidecar.telemetry.base import Instrument
from llm_sidecar.telemetry.calls import ModelCall, WorkerDeath
from llm_sidecar.telemetry.sentry_events import allowed

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

FLUSH_TIMEOUT: Final = 1.0
"""Seconds that the last events may delay the shutdown."""


@dataclass(slots=True)
class _Request:
    """The running request, and its current or latest model call."""

    request_id: str
    call: ModelCall | None = None


_REQUEST: ContextVar[_Request | None] = ContextVar("sentry_request", default=None)


class Sentry(Instrument):
    """Reports to one Sentry project."""

    def __init__(self, dsn: str, environment: str | None, traces_sample_rate: float) -> None:
        """Connects to nothing.

        Args:
            dsn: the address of the project; a secret.
            environment: Sentry's name of the deployment, or None.
            traces_sample_rate: share of requests whose duration is reported, from 0 to 1.
        """
        self._dsn = dsn
        self._environment = environment
        self._sample_rate = traces_sample_rate
        self._release = ""

    def install(self, app: FastAPI) -> None:
        """Adds the middleware that reports errors."""
        self._release = f"osiris-llm-sidecar@{app.version}"
        traced = self._sample_rate > 0
        app.add_middleware(_ReportErrors, transaction=_transaction if traced else _no_transaction)

    def start(self) -> None:
        """Starts the SDK without its integrations, which read requests, logs and arguments."""
        sentry_sdk.init(
            self._dsn,
            environment=self._environment,
            # Otherwise the SDK runs git.
            release=self._release,
            # None switches its tracing off, 0 leaves it on.
            traces_sample_rate=self._sample_rate or None,
            default_integrations=False,
            auto_enabling_integrations=False,
            send_default_pii=False,
            max_request_body_size="never",
            include_local_variables=False,
            max_breadcrumbs=0,
            auto_session_tracking=False,
            before_send=allowed,
            before_send_transaction=allowed,
        )

    async def close(self) -> None:
        """Delivers pending events, unless Sentry takes too long."""
        await asyncio.to_thread(sentry_sdk.get_client().close, FLUSH_TIMEOUT)

    def call_started(self, call: ModelCall) -> None:
        """Records the call, so that an error names its model."""
        if (request := _REQUEST.get()) is not None:
            request.call = call

    def call_finished(self, call: ModelCall) -> None:
        """Adds the call to the request's transaction, if it has one."""
        span = sentry_sdk.get_current_span()
        if span is not None and call.finished is not None:
            child = span.start_child(
                # Not `gen_ai.…`: the SDK sends such spans separately, without
                # `before_send_transaction`.
                op="model.call",
                name=f"{call.operation} {call.model}",
                start_timestamp=call.queued_unix,
            )
            child.finish(end_timestamp=call.queued_unix + call.finished - call.queued)

    def worker_died(self, death: WorkerDeath) -> None:
        """Reports the death, with the id of a request that the worker was serving."""
        request = None if death.call is None else death.call.context.get(_REQUEST)
        tags = {
            "model": death.model,
            "adapter": death.adapter,
            "request_id": None if request is None else request.request_id,
        }
        sentry_sdk.capture_event(
            {
                "level": "error",
                "message": f"The {death.model} worker ended ({death.how})",
                "tags": _known(tags),
            }
        )


class _ReportErrors:
    """ASGI middleware that reports each exception and raises it again."""

    def __init__(self, app: ASGIApp, transaction: Any) -> None:
        self._app = app
        self._transaction = transaction

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope["state"]["request_id"])
        token = _REQUEST.set(request)
        try:
            with self._transaction(scope):
                await self._app(scope, receive, send)
        except Exception as error:
            _report(error, request)
            raise
        finally:
            _REQUEST.reset(token)


@contextlib.contextmanager
def _transaction(scope: Scope) -> Iterator[None]:
    """Measures a request under the name of its route; a path can hold anything."""
    if not is_observed(scope):
        yield
        return
    with (
        sentry_sdk.isolation_scope(),
        sentry_sdk.start_transaction(op="http.server", name=known_method(scope["method"])),
    ):
        try:
            yield
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            name = f"{known_method(scope['method'])} {route}"
            sentry_sdk.get_current_scope().set_transaction_name(name, source="route")


@contextlib.contextmanager
def _no_transaction(scope: Scope) -> Iterator[None]:
    yield


def _report(error: Exception, request: _Request) -> None:
    call = request.call
    event, hint = event_from_exception(
        error,
        client_options=sentry_sdk.get_client().options,
        mechanism={"type": "asgi", "handled": False},
    )
    tags = {
        "request_id": request.request_id,
        "model": None if call is None else call.model,
        "adapter": None if call is None else call.adapter,
    }
    event["tags"] = _known(tags)
    sentry_sdk.capture_event(event, hint)


def _known(tags: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if value is not None}

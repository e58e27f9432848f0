"""Traces, Sentry and profiling behind one face, each there only where the settings ask for it.

    telemetry = build(settings)
    telemetry.install(app)
    telemetry.start()
    sidecar = Sidecar(settings, telemetry=telemetry)
    ...
    await telemetry.close()

What is off is not imported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import ModelCall, WorkerDeath

if TYPE_CHECKING:
    from fastapi import FastAPI

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def known_method(method: str) -> str:
    """An HTTP method as telemetry shows it: `other` for any that is not standard."""
    return method if method in _METHODS else "other"


class Instrument:
    """Observes nothing and costs nothing; each kind of telemetry overrides what it needs.

    It is an observer of model calls, as `telemetry.calls` has it.
    """

    def install(self, app: FastAPI) -> None:
        """Wraps the app, before it serves and inside of the middleware that knows request ids."""

    def start(self) -> None:
        """Begins to deliver; starts threads and opens connections only from here on."""

    async def close(self) -> None:
        """Delivers what is left within about a second, and stops."""

    def call_started(self, call: ModelCall) -> None:
        """A model is asked; on the event loop, in the context of the request."""

    def call_finished(self, call: ModelCall) -> None:
        """A model has answered or failed; on the event loop, in the context of the request."""

    def worker_died(self, death: WorkerDeath) -> None:
        """A worker has ended that nobody asked to."""


class Instruments(Instrument):
    """Several as one."""

    def __init__(self, parts: Sequence[Instrument]) -> None:
        self._parts = parts

    def install(self, app: FastAPI) -> None:
        """Installs each, the first one innermost."""
        for part in self._parts:
            part.install(app)

    def start(self) -> None:
        """Starts each."""
        for part in self._parts:
            part.start()

    async def close(self) -> None:
        """Closes all at once, so that the slowest sets the time."""
        await asyncio.gather(*(part.close() for part in self._parts))

    def call_started(self, call: ModelCall) -> None:
        """Tells each."""
        for part in self._parts:
            part.call_started(call)

    def call_finished(self, call: ModelCall) -> None:
        """Tells each."""
        for part in self._parts:
            part.call_finished(call)

    def worker_died(self, death: WorkerDeath) -> None:
        """Tells each."""
        for part in self._parts:
            part.worker_died(death)


def build(settings: Settings) -> Instrument:
    """What the settings ask for; neither connects nor starts anything."""
    parts: list[Instrument] = []
    if settings.telemetry.profiling:
        from llm_sidecar.telemetry.profiling import Profiling

        parts.append(Profiling())
    if settings.telemetry.otel_endpoint is not None:
        from llm_sidecar.telemetry.traces import Traces

        parts.append(Traces(settings.telemetry.otel_endpoint, settings.telemetry.otel_service_name))
    if dsn := settings.telemetry.sentry_dsn.get_secret_value():
        from llm_sidecar.telemetry.sentry import Sentry

        parts.append(
            Sentry(dsn, settings.telemetry.sentry_env, settings.telemetry.sentry_traces_sample_rate)
        )
    return Instruments(parts)

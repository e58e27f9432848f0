"""The base class of each kind of telemetry, and one that combines several."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_sidecar.telemetry.calls import CallObserver, ModelCall, Observers, WorkerDeath

if TYPE_CHECKING:
    from fastapi import FastAPI


class Instrument(CallObserver):
    """An instrument that does nothing; each kind of telemetry overrides what it needs."""

    def install(self, app: FastAPI) -> None:
        """Adds middleware to the app, before the app serves and inside of `RequestId`."""

    def start(self) -> None:
        """Starts to deliver; before that, there is no thread and no connection."""

    async def close(self) -> None:
        """Delivers pending data within about a second, and stops."""

    def call_started(self, call: ModelCall) -> None:
        """A model is called; on the event loop, in the context of the request."""

    def call_finished(self, call: ModelCall) -> None:
        """A model has answered or failed; on the event loop, in the context of the request."""

    def worker_died(self, death: WorkerDeath) -> None:
        """A worker has ended unexpectedly."""


class Instruments(Observers, Instrument):
    """Several instruments as one; each receives every call."""

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        super().__init__(*instruments)
        self._instruments = instruments

    def install(self, app: FastAPI) -> None:
        """Installs each, the first one innermost."""
        for instrument in self._instruments:
            instrument.install(app)

    def start(self) -> None:
        """Starts each."""
        for instrument in self._instruments:
            instrument.start()

    async def close(self) -> None:
        """Closes all concurrently, so that it takes as long as the slowest one."""
        await asyncio.gather(*(instrument.close() for instrument in self._instruments))

    def worker_died(self, death: WorkerDeath) -> None:
        """Passes the event to each."""
        for instrument in self._instruments:
            instrument.worker_died(death)

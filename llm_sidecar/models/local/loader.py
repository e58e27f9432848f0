"""Starts worker processes and loads the model in them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llm_sidecar.engines.base import GenerationRequest
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.logs import LogFormat
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.protocol import Load, Prefill

log = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 0.2
"""How long it is known whether the files exist; every health probe asks."""


@dataclass(slots=True)
class WorkerLoader:
    """Loads a model into workers.

    Attributes:
        name: `phi3` or `hermes`.
        locate: finds the files at each load; raises ModelUnavailable.
        device: `auto`, `cpu` or `cuda`.
        threads: of the runtime, on CPU.
        timeout: seconds that a model may load.
        log_format: of the workers' log lines.
        prefix: the messages that most requests begin with at present.
        tokens: completion tokens that all workers have generated.
    """

    name: str
    locate: Callable[[], ModelFiles]
    device: str
    threads: int
    timeout: float
    log_format: LogFormat = "auto"
    prefix: GenerationRequest | None = None
    tokens: int = 0
    _checked: float = -math.inf
    _missing: str | None = None

    async def load(self, adapter: Adapter | None) -> WorkerProcess:
        """Starts a worker that is ready; stops it if the load fails or is cancelled.

        Raises:
            ModelUnavailable: the model cannot be loaded; says why.
            OSError: no process can be started.
        """
        files, prefix, began = self.locate(), self.prefix, time.monotonic()
        folder = None if adapter is None else str(adapter.folder)
        load = Load(str(files.folder), self.device, self.threads, folder, prefix, self.log_format)
        worker = await WorkerProcess.start(
            files.label, None if adapter is None else adapter.name, self._count_tokens
        )
        try:
            async with asyncio.timeout(self.timeout):
                ready = await worker.load(load)
        except BaseException as error:
            # It may hang, and it serves no requests.
            worker.process.kill()
            await worker.stop()
            if isinstance(error, TimeoutError):
                raise ModelUnavailable(
                    f"it did not load within {self.timeout:g} s (MODEL_LOAD_TIMEOUT_SECONDS)"
                ) from None
            raise
        if self.prefix is not None and self.prefix != prefix:
            worker.send(Prefill(request=self.prefix))
        log.info(
            "%s is ready after %.1f s: %s on %s, %s",
            self.name,
            time.monotonic() - began,
            files.label,
            ready.identity.runtime,
            ready.identity.device,
        )
        return worker

    def missing(self) -> str | None:
        """Why the model cannot be loaded; None if its files exist."""
        now = time.monotonic()
        if now >= self._checked + _CHECK_SECONDS:
            self._checked, self._missing = now, None
            try:
                self.locate()
            except ModelUnavailable as error:
                self._missing = error.detail
        return self._missing

    def _count_tokens(self, tokens: int) -> None:
        self.tokens += tokens

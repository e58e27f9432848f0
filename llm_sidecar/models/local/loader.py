"""Starts worker processes and loads the model in them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llm_sidecar.engines.base import EngineOptions, GenerationRequest
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
        options: how it is loaded.
        timeout: seconds that a model may load.
        log_format: of the workers' log lines.
        prefix: the messages that most requests begin with at present.
        tokens: completion tokens that all workers have generated.
    """

    name: str
    locate: Callable[[], ModelFiles]
    options: EngineOptions
    timeout: float
    log_format: LogFormat = "auto"
    prefix: GenerationRequest | None = None
    tokens: int = 0
    _checked: float = -math.inf
    _missing: str | None = None

    async def load(self, adapter: Adapter | None) -> WorkerProcess:
        """Starts a worker that is ready; stops it if the load fails or is cancelled.

        Raises:
            UnusableFiles: the model cannot be loaded from its files; says why.
            ModelUnavailable: the model cannot be loaded now; says why.
            OSError: no process can be started.
        """
        files, prefix, began = self.locate(), self.prefix, time.monotonic()
        folder = None if adapter is None else str(adapter.folder)
        load = Load(str(files.model), self.options, folder, prefix, self.log_format)
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
        worker.notes = (*files.notes, *ready.notes)
        for note in worker.notes:
            log.warning("%s: %s", self.name, note)
        log.info(
            "%s is ready after %.1f s: %s on %s, %s%s",
            self.name,
            time.monotonic() - began,
            files.label,
            ready.identity.runtime,
            ready.identity.device,
            "" if ready.speed is None else f"; {ready.speed}",
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

    def file_stats(self, adapter: Adapter | None) -> object:
        """The names, sizes and times of the files that a load reads; equal if none has changed."""
        try:
            files = self.locate()
            folders = [files.folder]
            if adapter is not None:
                folders.append(adapter.folder)
            paths = [path for folder in folders for path in sorted(folder.iterdir())]
            if self.options.llama_server is not None:
                paths.append(Path(self.options.llama_server))
            return [(path, *_size_and_time(path)) for path in paths]
        except (ModelUnavailable, OSError):
            return None

    def _count_tokens(self, tokens: int) -> None:
        self.tokens += tokens


def _size_and_time(path: Path) -> tuple[int, ...]:
    """Empty for a link whose file is missing, as in the cache of an incomplete download."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    # The time is that of the status, which also changes with the permissions.
    return status.st_size, status.st_ctime_ns

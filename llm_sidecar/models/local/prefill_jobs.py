"""The prefixes that a worker prefills while it has no other work."""

from __future__ import annotations

import logging
from collections.abc import Generator

from llm_sidecar.engines import Engine
from llm_sidecar.models.local.outbox import Outbox
from llm_sidecar.models.local.protocol import Done, Failed, Prefill

log = logging.getLogger(__name__)


class PrefillJobs:
    """Prefills one prefix at a time; a new one replaces it."""

    def __init__(self, outbox: Outbox) -> None:
        """Has no job yet.

        Args:
            outbox: receives the answers.
        """
        self._outbox = outbox
        self._running: tuple[int, Generator[None]] | None = None

    def __bool__(self) -> bool:
        """Whether a prefix is being prefilled."""
        return self._running is not None

    def begin(self, engine: Engine, job: Prefill) -> None:
        """Prefills this prefix from now on."""
        if self._running is not None:
            number, steps = self._running
            steps.close()
            self._outbox.send(Done(id=number))
        self._running = job.id, engine.prefill(job.request)

    def step(self) -> None:
        """Prefills a piece of the prefix, if there is one."""
        if self._running is None:
            return
        number, steps = self._running
        try:
            next(steps)
        except StopIteration:
            self._outbox.send(Done(id=number))
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare exceptions
            # The type only: a runtime's message may quote the prompt.
            log.error("a prefix could not be prefilled: %s", type(error).__name__)
            self._outbox.send(Failed(id=number, detail=type(error).__name__))
        else:
            return
        self._running = None

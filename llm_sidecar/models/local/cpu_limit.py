"""Ends this process if one piece of work takes too much CPU time."""

from __future__ import annotations

import logging
import os
import threading
import time

log = logging.getLogger(__name__)


class CpuLimit:
    """A context that limits the CPU time of the thread that creates it.

    A chat template or a regular expression of a tokenizer may never end, and Python cannot stop a
    thread, so the process ends. Only the thread's CPU time counts, because it may wait for the
    thread that generates. A call that never releases the GIL blocks this limit too; then the server
    kills the process, which fails to end a cancelled job.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began: float | None = None
        if hasattr(time, "pthread_getcpuclockid"):  # macOS has none
            clock = time.pthread_getcpuclockid(threading.get_ident())
            threading.Thread(target=self._watch, args=(clock,), daemon=True).start()

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self._began = None

    def _watch(self, clock: int) -> None:
        while True:
            time.sleep(1.0)
            began = self._began
            if began is not None and time.clock_gettime(clock) - began > self._seconds:
                log.error(
                    "tokenizing one chat took longer than %g s, so this worker ends; "
                    "check the chat template and the tokenizer in the model's folder",
                    self._seconds,
                )
                os._exit(1)

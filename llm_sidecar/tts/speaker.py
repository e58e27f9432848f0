"""Speaks requests one after the other: publishes each part and returns the whole speech.

speaker = Speaker(bus, [EspeakVoice()])
spoken = await speaker.speak("Take the profit.", 0.5, None)
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    SidecarError,
    VoiceUnavailable,
)
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tasks import raise_if_cancelled
from llm_sidecar.tts import wav
from llm_sidecar.tts.choice import CheckedVoice
from llm_sidecar.tts.text import speakable
from llm_sidecar.tts.voice import AUDIO_BYTES, Reference, Voice, Wav

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A text as speech.

    Attributes:
        wav: a WAV file of all parts.
        voice: the name of the voice.
        cloned: whether the voice is a clone of the reference's.
    """

    wav: bytes
    voice: str
    cloned: bool


class Speaker:
    """The voices and the queue of requests.

    One request speaks at a time, whatever its voice, so the parts of two are never mixed on the
    bus. A cancelled request stops after its current part.
    """

    def __init__(
        self,
        bus: EventBus,
        voices: Sequence[CheckedVoice],
        *,
        queue_length: int = 64,
        timeout: float = 120.0,
    ) -> None:
        """Loads nothing.

        Args:
            voices: at least one, by preference. The first that is available speaks; if it fails
                before it has spoken anything of a text, the next one speaks the text.
            queue_length: requests that may speak and wait at once.
            timeout: seconds from admission to the whole WAV.
        """
        self._bus = bus
        self._voices = voices
        self._queue_length = queue_length
        self._timeout = timeout
        self._slot = asyncio.Lock()
        self._admitted = 0
        self._spoken = 0
        self._recent_seconds = 0.1
        self._closed = False

    def current_voice(self) -> Voice:
        """The voice that would speak now.

        Raises:
            VoiceUnavailable: the configured one is not available; says what to do.
        """
        return self._available()[0]

    def _available(self) -> list[Voice]:
        """The voices that can speak now, by preference; raises as `current_voice`."""
        if self._closed:
            raise VoiceUnavailable("The server is shutting down; try again.", retry_after=5)
        reasons = [voice.unavailable for voice in self._voices]
        if None not in reasons:
            raise VoiceUnavailable(f"{reasons[0]}", retry_after=5)
        return [voice for voice, reason in zip(self._voices, reasons, strict=True) if not reason]

    def check_capacity(self) -> None:
        """Raises QueueFull or VoiceUnavailable if a request would be refused now."""
        self.current_voice()
        if self._admitted >= self._queue_length:
            wait = self._retry_after()
            raise QueueFull(f"The speech queue is full; try again in {wait} s.", retry_after=wait)

    async def speak(
        self,
        text: str,
        exaggeration: float = 0.5,
        reference: Reference | None = None,
        on_part: Callable[[Wav], None] | None = None,
    ) -> Spoken:
        """Speaks a text and publishes the WAV of each part at once.

        Args:
            exaggeration: 0 to 2, 0.5 is neutral.
            reference: a sample of the voice to clone; a voice that cannot clone ignores it.
            on_part: called with each part, which has been published by then.

        Raises:
            InvalidRequest: nothing in the text can be spoken.
            QueueFull, VoiceUnavailable, DeadlineExceeded
        """
        if not speakable(text):
            raise InvalidRequest("there is no letter or digit in it to speak", field="text")
        with self._admission():
            asked, begun = time.monotonic(), None
            try:
                async with asyncio.timeout(self._timeout), self._slot:
                    begun = time.monotonic()
                    return await self._speak(text, exaggeration, reference, on_part)
            except TimeoutError:
                raise self._too_late(asked, begun or time.monotonic()) from None

    def _too_late(self, asked: float, begun: float) -> DeadlineExceeded:
        """The error for a missed deadline, with the duration of each phase."""
        waiting, speaking = begun - asked, time.monotonic() - begun
        remedy = "try again later" if waiting > speaking else "send less text"
        return DeadlineExceeded(
            f"The text was not spoken within {self._timeout:g} s: {waiting:.1f} s waiting, "
            f"{speaking:.1f} s speaking; {remedy}.",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> int:
        """Estimated seconds until the texts that run and wait now are spoken."""
        return max(1, round(self._admitted * self._recent_seconds))

    async def _speak(
        self,
        text: str,
        exaggeration: float,
        reference: Reference | None,
        on_part: Callable[[Wav], None] | None,
    ) -> Spoken:
        began = time.monotonic()
        parts: list[Wav] = []
        # The availability may have changed since the request was admitted.
        voice, *others = self._available()
        while True:
            try:
                await self._publish(voice, text, exaggeration, reference, parts, on_part)
                break
            except (DeadlineExceeded, QueueFull, VoiceUnavailable) as error:
                # A text is spoken in one voice, so no voice continues the text of another.
                if parts or not others:
                    raise
                failed, voice = voice, others.pop(0)
                log.warning("%s speaks instead of %s: %s", voice.name, failed.name, error.detail)
        if not parts:
            raise InvalidRequest("the voice knows no sound for anything in it", field="text")
        self._spoken += 1
        self._recent_seconds += 0.2 * (time.monotonic() - began - self._recent_seconds)
        cloned = voice.clones and reference is not None
        return Spoken(wav.encode(wav.join(parts)), voice.name, cloned)

    async def _publish(
        self,
        voice: Voice,
        text: str,
        exaggeration: float,
        reference: Reference | None,
        parts: list[Wav],
        on_part: Callable[[Wav], None] | None,
    ) -> None:
        """Publishes each part and appends it to `parts`."""
        reference = reference if voice.clones else None
        async with _closing(
            voice.speak(text, exaggeration=exaggeration, reference=reference)
        ) as speech:
            async for part in speech:
                parts.append(part)
                await self._bus.publish(AUDIO_BYTES, base64.b64encode(wav.encode(part)).decode())
                if on_part is not None:
                    on_part(part)
                raise_if_cancelled()

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        self.check_capacity()
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def available(self) -> bool:
        """Whether a request would be spoken now."""
        return self._unavailable() is None

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        reason = self._unavailable()
        return {
            "state": "ready" if reason is None else "unavailable",
            "reason": reason,
            "voice": self.current_voice().name if reason is None else None,
            "waiting": self._admitted,
            "spoken": self._spoken,
        }

    def _unavailable(self) -> str | None:
        try:
            self.current_voice()
        except SidecarError as error:
            return error.detail
        return None

    async def close(self) -> None:
        """Refuses new requests; frees the voices after the current request."""
        self._closed = True
        async with self._slot:
            for voice in self._voices:
                await voice.close()


@contextlib.asynccontextmanager
async def _closing(parts: AsyncIterator[Wav]) -> AsyncIterator[AsyncIterator[Wav]]:
    """Closes the generator at the end of the context, not when it is garbage-collected."""
    try:
        yield parts
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()

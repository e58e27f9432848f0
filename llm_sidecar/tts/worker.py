"""The server side of a remote voice: a worker that speaks for sidecars."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from llm_sidecar.errors import InvalidRequest, SidecarError, VoiceUnavailable, one_line
from llm_sidecar.input_model import summary
from llm_sidecar.tasks import cancel
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.messages import (
    ANSWER,
    LONGEST_REQUEST,
    MAX_SPEECH,
    End,
    Failure,
    Part,
    SpeechRequest,
)
from llm_sidecar.tts.reference import read_reference
from llm_sidecar.tts.speech_stream import Taken, Work
from llm_sidecar.tts.voice import Reference, Voice, Wav

HEARTBEAT_SECONDS: Final = 2.0
"""Seconds between two heartbeats. A heartbeat shows that the worker is running, and renews its
claim on a request."""
STALE_AFTER: Final = 10.0
"""Seconds without a heartbeat after which another worker may claim the request."""
MOST_DELIVERIES: Final = 3
"""Maximum number of workers that try to speak a request, because the request itself may crash
them."""
RETRY_EVERY: Final = 1.0
"""Seconds between two attempts while Redis is unavailable."""
CANCEL_TIMEOUT: Final = 1.0
"""Seconds to wait for a cancelled task."""
LEAVE_TIMEOUT: Final = 5.0
"""Seconds to wait for Redis at the end."""

log = logging.getLogger(__name__)


class ResumableVoice(Voice, Protocol):
    """A voice that can begin in the middle of a text."""

    def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None, first: int = 0
    ) -> AsyncIterator[Wav]:
        """As `Voice.speak`.

        Args:
            first: the number of the first part to speak; equal texts have equal parts.
        """
        ...


class SpeechWorker:
    """Speaks requests from Redis, one at a time.

    Args:
        client: may connect later; its owner closes it, after the worker.
        voice: its owner closes it, after the worker.
        heartbeat_seconds: seconds between two heartbeats.
        stale_after: seconds without a heartbeat after which another worker may claim the request.

    Attributes:
        worker_id: its name in `/health` of the sidecars.
    """

    def __init__(
        self,
        client: Redis,
        voice: ResumableVoice,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_after: float = STALE_AFTER,
    ) -> None:
        self._work = Work(client, stale_after)
        self.worker_id = self._work.worker_id
        self._voice = voice
        self._heartbeat_seconds = heartbeat_seconds
        self._failing = False
        self._taken: Taken | None = None
        self._speaking: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts to serve; Redis may become available later."""
        steps = (self._show, self._keep, self._serve)
        self._tasks = [
            asyncio.create_task(self._repeat(step), name=step.__name__) for step in steps
        ]

    async def close(self) -> None:
        """Takes no more requests; another worker continues the one that is being spoken."""
        await cancel(*self._tasks, patience=CANCEL_TIMEOUT)
        if self._speaking is not None:
            await cancel(self._speaking, patience=CANCEL_TIMEOUT)
        with contextlib.suppress(RedisError, TimeoutError):  # then the claim becomes stale
            async with asyncio.timeout(LEAVE_TIMEOUT):
                if self._taken is not None:
                    await self._work.hand_back(self._taken)
                await self._work.leave()

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeats a step until it is cancelled; logs the first of several failures."""
        while True:
            try:
                await step()
                self._failing = False
            except Exception as error:  # noqa: BLE001 - something else may answer at Redis' address
                if not self._failing:
                    log.error(
                        "Redis does not serve this worker; trying again: %s",
                        one_line(error),
                    )
                self._failing = True
                await asyncio.sleep(RETRY_EVERY)

    async def _show(self) -> None:
        """Sends heartbeats."""
        await self._work.show()
        await asyncio.sleep(self._heartbeat_seconds)

    async def _keep(self) -> None:
        """Renews the claim on a request; stops speaking it if the claim is lost."""
        taken = self._taken
        lost = taken is not None and not await self._work.keep(taken)
        # It may have ended in between.
        if lost and self._taken is taken and self._speaking is not None:
            self._speaking.cancel()
        await asyncio.sleep(self._heartbeat_seconds)

    async def _serve(self) -> None:
        """Waits a moment for a request, and speaks it."""
        self._taken = await self._work.take()
        if self._taken is not None:
            self._speaking = asyncio.create_task(self._speak(self._taken), name="speak")
            await asyncio.wait([self._speaking])
            speaking, self._speaking, self._taken = self._speaking, None, None
            if not speaking.cancelled():
                speaking.result()

    async def _speak(self, taken: Taken) -> None:
        last: End | Failure | None
        try:
            last = await self._answer(taken)
        except SidecarError as error:
            last = Failure(error=error.detail[:1000], kind=type(error).__name__)
        except RedisError:
            raise  # the claim becomes stale, and another worker continues
        except Exception as error:  # noqa: BLE001 - a voice's package raises anything
            # Only the type and the location: its message may quote the text.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("the voice failed: %s\n%s", type(error).__name__, where)
            last = Failure(error="the voice failed: see the worker's log")
        # If another worker has claimed it, that worker ends it.
        if last is None or await self._work.keep(taken):
            await self._work.finish(taken, None if last is None else last.model_dump_json())

    async def _answer(self, taken: Taken) -> End | None:
        """Sends the missing parts; None if the sidecar has gone."""
        if taken.deliveries > MOST_DELIVERIES:
            log.error("a request is given up: %d workers ended or lost it", MOST_DELIVERIES)
            raise VoiceUnavailable(f"{MOST_DELIVERIES} speech workers ended while they spoke this")
        if (found := await self._work.read(taken)) is None:
            return None
        request, reference, count = await asyncio.to_thread(_parse, *found)
        parts = self._voice.speak(
            request.text, exaggeration=request.exaggeration, reference=reference, first=count
        )
        size = 0
        try:
            async for part in parts:
                size += part.samples.nbytes
                if size > MAX_SPEECH:
                    raise VoiceUnavailable("the speech of this text is too long")
                message = await asyncio.to_thread(_part, count, part)
                if not await self._work.answer(taken, message):
                    return None
                count += 1
        finally:
            if isinstance(parts, AsyncGenerator):
                await parts.aclose()
        return End(end=count)


def _parse(message: str, latest: str | None) -> tuple[SpeechRequest, Reference | None, int]:
    """A request, its reference, and the number of parts that an earlier worker has sent."""
    if len(message) > LONGEST_REQUEST:
        raise InvalidRequest("the request for speech is too long")
    try:
        request = SpeechRequest.model_validate_json(message)
    except ValidationError as error:
        raise InvalidRequest(summary(error)) from None
    encoded = request.ref_wav_b64
    reference = None if encoded is None else read_reference(encoded)
    answer = None if latest is None else ANSWER.validate_json(latest)
    return request, reference, answer.index + 1 if isinstance(answer, Part) else 0


def _part(index: int, wav: Wav) -> str:
    encoded = base64.b64encode(wavs.encode(wav)).decode()
    return Part(index=index, wav_b64=encoded).model_dump_json()

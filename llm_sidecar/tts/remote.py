"""The client of speech workers: those on the same Redis speak for this sidecar."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from llm_sidecar.errors import DeadlineExceeded, QueueFull, VoiceUnavailable, one_line
from llm_sidecar.event_bus.redis_url import close_client
from llm_sidecar.logs import start_detached
from llm_sidecar.tasks import cancel
from llm_sidecar.tts.answers import RETRY_AFTER, Answers, WrongAnswer
from llm_sidecar.tts.messages import SpeechRequest
from llm_sidecar.tts.speech_stream import Asked, Requests
from llm_sidecar.tts.voice import Reference, Wav

PART_TIMEOUT: Final = 60.0
"""Seconds to wait for the next part of a text."""
SUSPENSION_SECONDS: Final = 60.0
"""Seconds for which no worker is used after a wrong or missing answer."""
GONE_AFTER: Final = 10.0
"""Seconds without a heartbeat of any worker after which a text fails. A restart of Redis takes
less."""
LOOK_EVERY: Final = 2.0
"""Seconds between two polls of the list of workers."""
MOST_WAITING: Final = 32
"""Maximum number of requests in Redis; with the largest references they take 450 MB."""
REMOVE_TIMEOUT: Final = 1.0
"""Seconds that the removal of a request may take; if it takes longer, it expires by itself."""
CANCEL_TIMEOUT: Final = 1.0
"""Seconds to wait for a cancelled task."""
RETRY_READ: Final = 0.5
"""Seconds between two attempts to read an answer while Redis is unavailable."""

_AWAY: Final = "Redis does not answer, so no Chatterbox worker can be used."
_LOST: Final = "Redis no longer has the text; send it again."
_DENIED: Final = "Redis denies the keys osiris.speech*, so no Chatterbox worker can be used."

log = logging.getLogger(__name__)


class RemoteVoice:
    """The voice of the speech workers that are running.

    Args:
        client: must raise on errors, not retry; the voice closes it.
        part_timeout: seconds that the next part of a text may take.
        gone_after: seconds without a heartbeat of any worker after which a text fails.
        look_every: seconds between two polls of the list of workers.

    Attributes:
        queued: requests of all sidecars that are not finished.
    """

    name = "chatterbox"
    clones = True

    def __init__(
        self,
        client: Redis,
        *,
        part_timeout: float = PART_TIMEOUT,
        gone_after: float = GONE_AFTER,
        look_every: float = LOOK_EVERY,
    ) -> None:
        self.queued = 0
        self._client = client
        self._requests = Requests(client)
        self._part_timeout = part_timeout
        self._gone_after = gone_after
        self._look_every = look_every
        self._workers: dict[str, float] = {}
        self._seen = 0.0
        self._trouble: str | None = None
        self._suspended_until = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts to look for workers; Redis may become available later."""
        self._looking = start_detached(self._look(), name="speech workers")

    async def close(self) -> None:
        """Stops; a text that is being spoken fails."""
        if self._looking is not None:
            await cancel(self._looking, patience=CANCEL_TIMEOUT)
        await close_client(self._client)

    @property
    def unavailable(self) -> str | None:
        """Why no worker can be used now, in one sentence, or None."""
        if self._trouble is not None:
            return self._trouble
        if not self._workers:
            return (
                "No Chatterbox worker is running: start one on the same REDIS_URL with "
                "python -m llm_sidecar.tts --voice chatterbox, or set TTS_VOICE=auto."
            )
        remaining = self._suspended_until - time.monotonic()
        if remaining > 0:
            return (
                f"The Chatterbox workers are not used for {remaining:.0f} s, because one of them "
                "answered wrongly or not at all: see the sidecar's log, or set TTS_VOICE=auto."
            )
        return None

    def workers(self) -> list[dict[str, Any]]:
        """The running workers, for `/health`."""
        return [
            {"worker_id": worker_id, "seconds_ago": round(age, 3)}
            for worker_id, age in self._workers.items()
        ]

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Speaks a text part by part; the first free worker does it.

        Raises:
            VoiceUnavailable: no worker is running, Redis is unavailable, or an answer is wrong.
            DeadlineExceeded: a part took too long.
            QueueFull: too many requests wait for the workers.
            InvalidRequest: the worker refuses the text, the reference or the exaggeration.
        """
        request = await asyncio.to_thread(_request, text, exaggeration, reference)
        asked = await self._ask(request)
        answers = Answers(text)
        try:
            while not answers.ended:
                message = await self._next(asked)
                part = await asyncio.to_thread(answers.read, message)
                if part is not None:
                    yield part
        except WrongAnswer as error:
            self._suspend_workers(f"an answer is wrong: {error}")
            raise VoiceUnavailable(
                f"A speech worker answered wrongly: {error}.", retry_after=RETRY_AFTER
            ) from None
        finally:
            await self._remove(asked)

    async def _ask(self, request: str) -> Asked:
        if (reason := self.unavailable) is not None:
            raise VoiceUnavailable(reason, retry_after=RETRY_AFTER)
        if self.queued >= MOST_WAITING:
            raise QueueFull("the queue of the speech workers is full", retry_after=RETRY_AFTER)
        try:
            return await self._requests.add(request)
        except RedisError as error:
            log.error("Redis does not take a text to speak: %s", type(error).__name__)
            raise VoiceUnavailable(_reason(error), retry_after=RETRY_AFTER) from None

    async def _next(self, asked: Asked) -> str:
        """The next answer, if it comes in time and while a worker is running."""
        deadline = time.monotonic() + self._part_timeout
        while time.monotonic() < min(deadline, self._seen + self._gone_after):
            try:
                message = await self._requests.read(asked)
            except KeyError:
                raise VoiceUnavailable(_LOST, retry_after=RETRY_AFTER) from None
            except RedisError as error:
                if isinstance(error, NoPermissionError):
                    raise VoiceUnavailable(_DENIED, retry_after=RETRY_AFTER) from None
                await asyncio.sleep(RETRY_READ)  # it may be back in a moment
                continue
            if message is not None:
                return message
        if time.monotonic() < deadline:
            raise VoiceUnavailable(
                self._trouble or "The speech workers ended in the middle of a text.",
                retry_after=RETRY_AFTER,
            )
        raise await self._late(asked)

    async def _late(self, asked: Asked) -> DeadlineExceeded:
        """The error for a part that did not come in time."""
        waiting = False
        with contextlib.suppress(RedisError):
            waiting = await self._requests.is_waiting(asked, len(self._workers))
        if not waiting:
            self._suspend_workers("there is no answer")
        what = "were busy with other texts" if waiting else "spoke no further part of the text"
        return DeadlineExceeded(
            f"The speech workers {what} for {self._part_timeout:.0f} s; try again later.",
            retry_after=RETRY_AFTER,
        )

    def _suspend_workers(self, reason: str) -> None:
        log.error("speech workers are not used for %.0f s: %s", SUSPENSION_SECONDS, reason)
        self._suspended_until = time.monotonic() + SUSPENSION_SECONDS

    async def _remove(self, asked: Asked) -> None:
        """Removes a request. If that fails or takes too long, the request expires by itself."""
        with contextlib.suppress(RedisError, TimeoutError):
            async with asyncio.timeout(REMOVE_TIMEOUT):
                await self._requests.remove(asked)

    async def _look(self) -> None:
        """Polls the list of workers."""
        while True:
            try:
                workers, self.queued = await self._requests.overview()
            except Exception as error:  # noqa: BLE001 - something else may answer at Redis' address
                self._workers = {}
                self._set_trouble(error)
            else:
                self._set_trouble(None)
                self._set_workers(workers)
            await asyncio.sleep(self._look_every)

    def _set_trouble(self, error: Exception | None) -> None:
        reason = None if error is None else _reason(error)
        if error is not None and reason != self._trouble:
            log.error("no speech worker can be used: %s", one_line(error))
        self._trouble = reason

    def _set_workers(self, workers: dict[str, float]) -> None:
        for worker_id in workers.keys() - self._workers.keys():
            log.info("speech worker %s is running", worker_id)
        for worker_id in self._workers.keys() - workers.keys():
            log.warning("speech worker %s has ended", worker_id)
        self._workers = workers
        if workers:
            self._seen = time.monotonic() - min(workers.values())


def _request(text: str, exaggeration: float, reference: Reference | None) -> str:
    encoded = None if reference is None else base64.b64encode(reference.wav).decode()
    # Not validated here, because the worker does that.
    return SpeechRequest.model_construct(
        text=text, exaggeration=exaggeration, ref_wav_b64=encoded
    ).model_dump_json()


def _reason(error: Exception) -> str:
    return _DENIED if isinstance(error, NoPermissionError) else _AWAY

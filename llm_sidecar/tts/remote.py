"""The asking end of a remote voice: speech workers on the same Redis speak for this sidecar."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    SidecarError,
    VoiceUnavailable,
)
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.subscriber import cancel
from llm_sidecar.input_model import summary
from llm_sidecar.logs import start_detached
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.messages import (
    ANNOUNCED,
    ANSWER,
    LONGEST_ANNOUNCEMENT,
    LONGEST_ANSWER,
    STATUSES,
    Announcement,
    Answer,
    Cancellation,
    End,
    Failure,
    Part,
    SpeechRequest,
    cancelled,
    requested,
    spoken,
)
from llm_sidecar.tts.voice import Reference, Wav

ALIVE_FOR: Final = 6.0
"""Seconds after its last announcement for which a worker counts as there."""
PART_TIMEOUT: Final = 120.0
"""Seconds that the next part may take: the longest one on a CPU, behind another's."""
LOST_AFTER: Final = 3.0
"""Seconds for which a worker announces itself without a request that it was given, until that
counts as lost: longer than any message is on its way."""
RETRY_AFTER: Final = 5
"""Seconds after which a worker may be back."""
ANSWERS: Final = 256
"""Answers that Redis has brought and nobody has looked at yet."""
PARTS_AHEAD: Final = 64
"""Parts of one text that wait to be taken."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds after which a task that resists being cancelled is left behind."""

_LOST: Final = "a part of the speech was lost on its way"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    """A worker that has announced itself.

    Attributes:
        asked: requests of this sidecar's that it was given, and since when it has announced
            itself without them.
    """

    announcement: Announcement
    seen: float
    asked: dict[str, float | None] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return max(self.announcement.waiting, len(self.asked))

    def lost(self, now: float, patience: float) -> list[str]:
        """The requests that it has not had for as long as that."""
        for request_id, since in self.asked.items():
            here = request_id in self.announcement.requests
            self.asked[request_id] = None if here else since or now
        return [
            request_id
            for request_id, since in self.asked.items()
            if since is not None and now - since >= patience
        ]


class RemoteVoice:
    """The voice of whatever speech workers there are.

    Args:
        bus: its owner closes it, after the voice.
        alive_for: seconds after its last announcement for which a worker counts as there.
        part_timeout: seconds that the next part of a text may take.
        lost_after: seconds for which a worker is without a request until that counts as lost.

    Attributes:
        name: the voice of the worker that was heard of last.
        clones: whether a worker can speak in the voice of a reference.
    """

    name = "chatterbox"
    clones = True

    def __init__(
        self,
        bus: EventBus,
        *,
        alive_for: float = ALIVE_FOR,
        part_timeout: float = PART_TIMEOUT,
        lost_after: float = LOST_AFTER,
    ) -> None:
        self._bus = bus
        self._lost_after = lost_after
        self._alive_for = alive_for
        self._part_timeout = part_timeout
        self._replies = spoken(uuid.uuid4().hex)
        self._workers: dict[str, _Worker] = {}
        self._waiting: dict[str, asyncio.Queue[Answer]] = {}
        self._queues: dict[str, asyncio.Queue[str]] = {
            ANNOUNCED: asyncio.Queue(ANSWERS),
            self._replies: asyncio.Queue(ANSWERS),
        }
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listens for workers; Redis may come later."""
        for channel, queue in self._queues.items():
            await self._bus.register_listener_queue(channel, queue)
        self._tasks = [
            start_detached(self._meet(self._queues[ANNOUNCED]), name="tts announced"),
            start_detached(self._hear(self._queues[self._replies]), name="tts spoken"),
        ]

    async def close(self) -> None:
        """Listens no more; what is still asked for fails."""
        for channel, queue in self._queues.items():
            await self._bus.unregister_listener_queue(channel, queue)
        await cancel(*self._tasks, patience=CANCEL_TIMEOUT)
        self._workers.clear()

    @property
    def available(self) -> bool:
        """Whether Redis is there, and a worker has announced itself within the last seconds."""
        return self._bus.connected and any(True for _ in self._alive())

    def workers(self) -> list[dict[str, Any]]:
        """What `/health` shows: the workers that are there, and what they have to do."""
        return [
            {"worker_id": a.worker_id, "voice": a.voice, "waiting": a.waiting}
            for a in (worker.announcement for worker in self._alive())
        ]

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Speaks a text part by part, by the worker that has least to do.

        Raises:
            VoiceUnavailable: no worker is there, it went away, or a part was lost.
            DeadlineExceeded: a part took too long.
            QueueFull: the worker has as much to do as it takes.
            InvalidRequest: the worker refuses the text, the reference or the exaggeration.
        """
        worker = self._least_busy(cloning=reference is not None)
        worker_id = worker.announcement.worker_id
        request_id = uuid.uuid4().hex
        answers = self._waiting[request_id] = asyncio.Queue(PARTS_AHEAD)
        worker.asked[request_id] = None
        ended = False
        try:
            payload = await asyncio.to_thread(
                self._request, request_id, text, exaggeration, reference
            )
            if not await self._bus.publish(requested(worker_id), payload):
                raise VoiceUnavailable(
                    "Redis is away, and with it the voice", retry_after=RETRY_AFTER
                )
            count = 0
            while not ended:
                answer = await self._next(answers, worker_id)
                if isinstance(answer, Failure):
                    ended = True
                    raise _error(answer)
                if isinstance(answer, Part) and answer.index == count:
                    yield await asyncio.to_thread(_decode, answer)
                    count += 1
                elif isinstance(answer, End) and answer.end == count:
                    ended = True
                else:
                    raise VoiceUnavailable(_LOST, retry_after=RETRY_AFTER)
        finally:
            del worker.asked[request_id]
            del self._waiting[request_id]
            if not ended:
                cancellation = Cancellation(request_id=request_id)
                await self._bus.publish(cancelled(worker_id), cancellation.model_dump_json())

    def _request(
        self, request_id: str, text: str, exaggeration: float, reference: Reference | None
    ) -> str:
        encoded = None if reference is None else base64.b64encode(reference.wav).decode()
        # Unchecked: what is wrong with it is the worker's to say.
        return SpeechRequest.model_construct(
            request_id=request_id,
            reply_to=self._replies,
            text=text,
            exaggeration=exaggeration,
            ref_wav_b64=encoded,
        ).model_dump_json()

    async def _next(self, answers: asyncio.Queue[Answer], worker_id: str) -> Answer:
        """The next answer, as long as the worker is there and the time is not up."""
        deadline = time.monotonic() + self._part_timeout
        while True:
            patience = min(deadline, self._alive_until(worker_id)) - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    return await answers.get()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"the voice did not speak the next part within {self._part_timeout:.0f} s; "
                    "try again later or with less text.",
                    retry_after=RETRY_AFTER,
                )
            if time.monotonic() >= self._alive_until(worker_id):
                raise VoiceUnavailable(
                    "the voice went away in the middle of a text", retry_after=RETRY_AFTER
                )

    def _alive_until(self, worker_id: str) -> float:
        worker = self._workers.get(worker_id)
        return 0.0 if worker is None else worker.seen + self._alive_for

    def _alive(self) -> Iterator[_Worker]:
        now = time.monotonic()
        return (w for w in self._workers.values() if now < w.seen + self._alive_for)

    def _least_busy(self, *, cloning: bool) -> _Worker:
        able = [worker for worker in self._alive() if worker.announcement.clones or not cloning]
        # A voice that cannot clone is better than none.
        able = able or list(self._alive())
        if not able:
            raise VoiceUnavailable(
                "no speech worker is there: start python -m llm_sidecar.tts --voice chatterbox "
                "with the same REDIS_URL",
                retry_after=RETRY_AFTER,
            )
        return min(able, key=lambda worker: worker.load)

    async def _meet(self, payloads: asyncio.Queue[str]) -> None:
        while True:
            payload = await payloads.get()
            if len(payload) > LONGEST_ANNOUNCEMENT:
                self._bus.refuse(ANNOUNCED, "it is too long")
                continue
            try:
                announcement = Announcement.model_validate_json(payload)
            except ValidationError as error:
                self._bus.refuse(ANNOUNCED, f"it is no announcement: {summary(error)}")
                continue
            self._note(announcement)

    def _note(self, announcement: Announcement) -> None:
        """Keeps who is there and forgets who is not."""
        now = time.monotonic()
        known = self._workers.get(announcement.worker_id)
        if announcement.leaving:
            self._workers.pop(announcement.worker_id, None)
        elif known is None:
            self._workers[announcement.worker_id] = _Worker(announcement, now)
            log.info("speech worker %s is there", announcement.worker_id)
        else:
            known.announcement, known.seen = announcement, now
            for request_id in known.lost(now, self._lost_after):
                answers = self._waiting[request_id]
                # One that has come is looked at first.
                if answers.empty():
                    answers.put_nowait(Failure(request_id=request_id, error=_LOST))
        for worker_id, worker in list(self._workers.items()):
            if now >= worker.seen + self._alive_for:
                del self._workers[worker_id]
        self.name = announcement.voice
        self.clones = any(worker.announcement.clones for worker in self._workers.values())

    async def _hear(self, payloads: asyncio.Queue[str]) -> None:
        while True:
            payload = await payloads.get()
            if len(payload) > LONGEST_ANSWER:
                self._bus.refuse(self._replies, "it is too long")
                continue
            try:
                answer = await asyncio.to_thread(ANSWER.validate_json, payload)
            except ValidationError:
                self._bus.refuse(self._replies, "it is no answer")
                continue
            answers = self._waiting.get(answer.request_id)
            # Nobody waits for what was cancelled. What finds no room leaves a gap that is noticed.
            if answers is not None and not answers.full():
                answers.put_nowait(answer)


def _error(failure: Failure) -> SidecarError:
    kinds = {status: kind for kind, status in STATUSES.items()}
    kind = kinds.get(failure.status, VoiceUnavailable)
    return kind(failure.error, retry_after=None if kind is InvalidRequest else RETRY_AFTER)


def _decode(part: Part) -> Wav:
    try:
        return wavs.decode(base64.b64decode(part.wav_b64, validate=True))
    except ValueError:
        raise VoiceUnavailable("a part of the speech is no WAV", retry_after=RETRY_AFTER) from None

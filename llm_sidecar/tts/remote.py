"""The client of speech workers: those on the same Redis speak for this sidecar."""

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
    KINDS,
    LONGEST_ANNOUNCEMENT,
    LONGEST_ANSWER,
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
"""Seconds after its last announcement for which a worker counts as running."""
PART_TIMEOUT: Final = 120.0
"""Seconds to wait for the next part: the longest part on a CPU, behind one of another request."""
LOST_AFTER: Final = 3.0
"""Seconds for which a worker's announcements may lack a request before it counts as lost; longer
than any message takes."""
RETRY_AFTER: Final = 5
"""Seconds after which a worker may be back."""
ANSWERS: Final = 256
"""Maximum number of unhandled messages of one channel."""
PARTS_AHEAD: Final = 64
"""Maximum number of received, unconsumed parts of one text."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds to wait for a cancelled task."""

_LOST: Final = "a part of the speech was lost on its way"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    """A worker that has announced itself.

    Attributes:
        sent: this sidecar's requests to it; for each, the time since which announcements lack it,
            or None.
    """

    announcement: Announcement
    seen: float
    sent: dict[str, float | None] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return max(self.announcement.waiting, len(self.sent))

    def lost(self, now: float, patience: float) -> list[str]:
        """The requests that its announcements have lacked for `patience` seconds or more."""
        for request_id, since in self.sent.items():
            here = request_id in self.announcement.requests
            self.sent[request_id] = None if here else since or now
        return [
            request_id
            for request_id, since in self.sent.items()
            if since is not None and now - since >= patience
        ]


class RemoteVoice:
    """The voice of the speech workers that are running.

    Args:
        bus: its owner closes it, after the voice.
        alive_for: seconds after its last announcement for which a worker counts as running.
        part_timeout: seconds that the next part of a text may take.
        lost_after: seconds for which announcements may lack a request before it counts as lost.

    Attributes:
        name: the voice in the latest announcement.
        clones: whether a worker can clone the voice of a reference.
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
        """Starts to receive messages; Redis may become available later."""
        for channel, queue in self._queues.items():
            await self._bus.register_listener_queue(channel, queue)
        self._tasks = [
            start_detached(
                self._receive_announcements(self._queues[ANNOUNCED]), name="tts announced"
            ),
            start_detached(self._receive_answers(self._queues[self._replies]), name="tts spoken"),
        ]

    async def close(self) -> None:
        """Stops receiving messages; requests that are not finished fail."""
        for channel, queue in self._queues.items():
            await self._bus.unregister_listener_queue(channel, queue)
        await cancel(*self._tasks, patience=CANCEL_TIMEOUT)
        self._workers.clear()

    @property
    def available(self) -> bool:
        """Whether Redis is connected and a worker has announced itself within the last seconds."""
        return self._bus.connected and any(True for _ in self._alive())

    def workers(self) -> list[dict[str, Any]]:
        """The running workers and their load, for `/health`."""
        return [
            {"worker_id": a.worker_id, "voice": a.voice, "waiting": a.waiting}
            for a in (worker.announcement for worker in self._alive())
        ]

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Speaks a text part by part, with the least busy worker.

        Raises:
            VoiceUnavailable: no worker is running, it has ended, or a part was lost.
            DeadlineExceeded: a part took too long.
            QueueFull: the worker's queue is full.
            InvalidRequest: the worker refuses the text, the reference or the exaggeration.
        """
        worker = self._least_busy(cloning=reference is not None)
        worker_id = worker.announcement.worker_id
        request_id = uuid.uuid4().hex
        answers = self._waiting[request_id] = asyncio.Queue(PARTS_AHEAD)
        worker.sent[request_id] = None
        ended = False
        try:
            payload = await asyncio.to_thread(
                self._request, request_id, text, exaggeration, reference
            )
            if not await self._bus.publish(requested(worker_id), payload):
                raise VoiceUnavailable(
                    "Redis is unavailable, and so is the voice", retry_after=RETRY_AFTER
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
            del worker.sent[request_id]
            del self._waiting[request_id]
            if not ended:
                cancellation = Cancellation(request_id=request_id)
                await self._bus.publish(cancelled(worker_id), cancellation.model_dump_json())

    def _request(
        self, request_id: str, text: str, exaggeration: float, reference: Reference | None
    ) -> str:
        encoded = None if reference is None else base64.b64encode(reference.wav).decode()
        # Not validated here, because the worker does that.
        return SpeechRequest.model_construct(
            request_id=request_id,
            reply_to=self._replies,
            text=text,
            exaggeration=exaggeration,
            ref_wav_b64=encoded,
        ).model_dump_json()

    async def _next(self, answers: asyncio.Queue[Answer], worker_id: str) -> Answer:
        """The next answer, if it arrives in time and while the worker is running."""
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
                    "the speech worker ended in the middle of a text", retry_after=RETRY_AFTER
                )

    def _alive_until(self, worker_id: str) -> float:
        worker = self._workers.get(worker_id)
        return 0.0 if worker is None else worker.seen + self._alive_for

    def _alive(self) -> Iterator[_Worker]:
        now = time.monotonic()
        return (w for w in self._workers.values() if now < w.seen + self._alive_for)

    def _least_busy(self, *, cloning: bool) -> _Worker:
        able = [worker for worker in self._alive() if worker.announcement.clones or not cloning]
        # Without a worker that clones, the text is spoken in another voice.
        able = able or list(self._alive())
        if not able:
            raise VoiceUnavailable(
                "no speech worker is running: start python -m llm_sidecar.tts --voice chatterbox "
                "with the same REDIS_URL",
                retry_after=RETRY_AFTER,
            )
        return min(able, key=lambda worker: worker.load)

    async def _receive_announcements(self, payloads: asyncio.Queue[str]) -> None:
        while True:
            payload = await payloads.get()
            if len(payload) > LONGEST_ANNOUNCEMENT:
                self._bus.refuse(ANNOUNCED, "it is too long")
                continue
            try:
                announcement = Announcement.model_validate_json(payload)
            except ValidationError as error:
                self._bus.refuse(ANNOUNCED, f"it is not an announcement: {summary(error)}")
                continue
            self._update(announcement)

    def _update(self, announcement: Announcement) -> None:
        """Adds, updates and removes workers; fails requests that were lost."""
        now = time.monotonic()
        known = self._workers.get(announcement.worker_id)
        if announcement.leaving:
            self._workers.pop(announcement.worker_id, None)
        elif known is None:
            self._workers[announcement.worker_id] = _Worker(announcement, now)
            log.info("speech worker %s is running", announcement.worker_id)
        else:
            known.announcement, known.seen = announcement, now
            for request_id in known.lost(now, self._lost_after):
                answers = self._waiting[request_id]
                # Answers that have arrived are handled first.
                if answers.empty():
                    answers.put_nowait(Failure(request_id=request_id, error=_LOST))
        for worker_id, worker in list(self._workers.items()):
            if now >= worker.seen + self._alive_for:
                del self._workers[worker_id]
        self.name = announcement.voice
        self.clones = any(worker.announcement.clones for worker in self._workers.values())

    async def _receive_answers(self, payloads: asyncio.Queue[str]) -> None:
        while True:
            payload = await payloads.get()
            if len(payload) > LONGEST_ANSWER:
                self._bus.refuse(self._replies, "it is too long")
                continue
            try:
                answer = await asyncio.to_thread(ANSWER.validate_json, payload)
            except ValidationError:
                self._bus.refuse(self._replies, "it is not an answer")
                continue
            answers = self._waiting.get(answer.request_id)
            # A cancelled request has no queue. An answer that is dropped here leaves a gap in the
            # numbers of the parts, which fails the request.
            if answers is not None and not answers.full():
                answers.put_nowait(answer)


def _error(failure: Failure) -> SidecarError:
    kind = KINDS.get(failure.kind, VoiceUnavailable)
    return kind(failure.error, retry_after=None if kind is InvalidRequest else RETRY_AFTER)


def _decode(part: Part) -> Wav:
    try:
        return wavs.decode(base64.b64decode(part.wav_b64, validate=True))
    except ValueError:
        raise VoiceUnavailable(
            "a part of the speech is not a WAV", retry_after=RETRY_AFTER
        ) from None

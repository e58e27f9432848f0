"""The server side of a remote voice: a worker that speaks for sidecars."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import traceback
import uuid
from collections.abc import AsyncGenerator
from typing import Final

from pydantic import ValidationError

from llm_sidecar.errors import InvalidRequest, QueueFull, SidecarError, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.subscriber import cancel
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.messages import (
    ANNOUNCED,
    INCOMING,
    LONGEST_REQUEST,
    Announcement,
    Answer,
    Cancellation,
    End,
    Failure,
    Part,
    ReplyTo,
    SpeechRequest,
    cancelled,
    requested,
)
from llm_sidecar.tts.reference import read_reference
from llm_sidecar.tts.voice import Reference, Voice, Wav

ANNOUNCE_EVERY: Final = 2.0
"""Seconds between two announcements."""
MAX_WAITING: Final = 16
"""Maximum number of requests of a worker; with the largest references they take 220 MB."""
INBOX: Final = 64
"""Maximum number of unhandled messages."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds to wait for a cancelled task."""

log = logging.getLogger(__name__)


class SpeechWorker:
    """Announces a voice on the event bus and speaks requests in order, one at a time.

    Args:
        bus: may connect later; its owner closes it, after the worker.
        voice: its owner closes it, after the worker.
        announce_every: seconds between two announcements.
        max_waiting: requests that it accepts at a time; one more is answered with an error.
    """

    def __init__(
        self,
        bus: EventBus,
        voice: Voice,
        *,
        announce_every: float = ANNOUNCE_EVERY,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.worker_id = uuid.uuid4().hex
        self._bus = bus
        self._voice = voice
        self._announce_every = announce_every
        self._max_waiting = max_waiting
        self._inbox: asyncio.Queue[str] = asyncio.Queue(INBOX)
        # In the order of arrival; the first one is being spoken.
        self._requests: dict[str, SpeechRequest] = {}
        self._arrived = asyncio.Event()
        self._speaking: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts to serve; Redis may become available later."""
        for channel in self._channels():
            await self._bus.register_listener_queue(channel, self._inbox)
        jobs = (self._receive, self._serve, self._announce)
        self._tasks = [asyncio.create_task(job(), name=job.__name__) for job in jobs]

    async def close(self) -> None:
        """Accepts no more requests, and answers the waiting ones with an error."""
        for channel in self._channels():
            await self._bus.unregister_listener_queue(channel, self._inbox)
        await cancel(*self._tasks, patience=CANCEL_TIMEOUT)
        if self._speaking is not None:
            await cancel(self._speaking, patience=CANCEL_TIMEOUT)
        for request in self._requests.values():
            await self._fail(request, VoiceUnavailable("the voice is shutting down"))
        self._requests.clear()
        if self._tasks and self._bus.connected:
            await self._publish_announcement(leaving=True)

    def _channels(self) -> tuple[str, str]:
        # One queue for both: a cancellation must not overtake its request.
        return requested(self.worker_id), cancelled(self.worker_id)

    async def _announce(self) -> None:
        while True:
            if self._bus.connected:
                await self._publish_announcement()
            await asyncio.sleep(self._announce_every)

    async def _publish_announcement(self, *, leaving: bool = False) -> None:
        announcement = Announcement(
            worker_id=self.worker_id,
            voice=self._voice.name,
            clones=self._voice.clones,
            sample_rate=getattr(self._voice, "sample_rate", None),
            waiting=len(self._requests),
            requests=frozenset(self._requests),
            leaving=leaving,
        )
        await self._bus.publish(ANNOUNCED, announcement.model_dump_json())

    async def _receive(self) -> None:
        while True:
            payload = await self._inbox.get()
            if len(payload) > LONGEST_REQUEST:
                self._bus.refuse(requested(self.worker_id), "it is too long")
                continue
            try:
                message = INCOMING.validate_json(payload)
            except ValidationError as error:
                await self._refuse(payload, error)
                continue
            if isinstance(message, Cancellation):
                self._cancel(message.request_id)
            elif len(self._requests) >= self._max_waiting:
                await self._fail(message, QueueFull("the queue of the speech worker is full"))
            else:
                self._requests[message.request_id] = message
                self._arrived.set()

    async def _refuse(self, payload: str, error: ValidationError) -> None:
        """Answers an invalid request with the reason, if it says where answers go."""
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        try:
            request = ReplyTo.model_validate_json(payload)
        except ValidationError:
            self._bus.refuse(requested(self.worker_id), f"it is not a request: {first['msg']}")
            return
        await self._fail(request, InvalidRequest(f"{first['loc'][-1]}: {first['msg']}"))

    def _cancel(self, request_id: str) -> None:
        if self._speaking is not None and request_id == next(iter(self._requests), None):
            self._speaking.cancel()
        else:
            self._requests.pop(request_id, None)

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._requests:
                request = next(iter(self._requests.values()))
                self._speaking = asyncio.create_task(self._speak(request), name="speak")
                await asyncio.wait([self._speaking])
                self._speaking = None
                del self._requests[request.request_id]

    async def _speak(self, request: SpeechRequest) -> None:
        try:
            await self._answer(request)
        except _NotSent:
            # The bus has logged it, and the sidecar notices that the request was lost.
            return
        except SidecarError as error:
            await self._fail(request, error)
        except Exception as error:  # noqa: BLE001 - a voice's package raises anything
            # Only the type and the location: its message may quote the text.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("the voice failed: %s\n%s", type(error).__name__, where)
            await self._fail(request, VoiceUnavailable("the voice failed: see the worker's log"))

    async def _answer(self, request: SpeechRequest) -> None:
        reference = await asyncio.to_thread(_reference, request)
        count = 0
        parts = self._voice.speak(
            request.text, exaggeration=request.exaggeration, reference=reference
        )
        try:
            async for part in parts:
                await self._send(request, await asyncio.to_thread(_part, request, count, part))
                count += 1
        finally:
            if isinstance(parts, AsyncGenerator):
                await parts.aclose()
        await self._send(request, End(request_id=request.request_id, end=count))

    async def _send(self, request: ReplyTo, answer: Answer) -> None:
        if not await self._bus.publish(request.reply_to, answer.model_dump_json()):
            raise _NotSent

    async def _fail(self, request: ReplyTo, error: SidecarError) -> None:
        failure = Failure(
            request_id=request.request_id,
            error=error.detail[:1000],
            kind=type(error).__name__,
        )
        with contextlib.suppress(_NotSent):
            await self._send(request, failure)


class _NotSent(Exception):
    """An answer could not be published."""


def _reference(request: SpeechRequest) -> Reference | None:
    if request.ref_wav_b64 is None:
        return None
    return read_reference(request.ref_wav_b64)


def _part(request: SpeechRequest, index: int, wav: Wav) -> Part:
    encoded = base64.b64encode(wavs.encode(wav)).decode()
    return Part(request_id=request.request_id, index=index, wav_b64=encoded)

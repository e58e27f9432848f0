"""Checks and decodes the answers of a speech worker to one request."""

from __future__ import annotations

import base64
from typing import Final

from pydantic import ValidationError

from llm_sidecar.errors import InvalidRequest, SidecarError, VoiceUnavailable
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.messages import (
    ANSWER,
    KINDS,
    LONGEST_ANSWER,
    MAX_SPEECH,
    End,
    Failure,
    Part,
)
from llm_sidecar.tts.reference import MAX_RATE, MIN_RATE
from llm_sidecar.tts.voice import Wav

RETRY_AFTER: Final = 5
"""Seconds after which a worker may be back."""


class WrongAnswer(Exception):
    """A worker's answer violates the protocol; the message quotes nothing of it."""


class Answers:
    """The answers to one request, read one by one.

    Args:
        text: the text to speak; its speech has at most one part per character.

    Attributes:
        ended: whether the speech is complete.
    """

    def __init__(self, text: str) -> None:
        self.ended = False
        self._most = len(text)
        self._count = 0
        self._bytes = 0
        self._rate: int | None = None

    def read(self, message: str) -> Wav | None:
        """The next part; None for the end, and for a part that two workers have sent.

        Raises:
            WrongAnswer: it is not an answer, not the next answer, or the speech is too long.
            InvalidRequest, QueueFull, DeadlineExceeded, VoiceUnavailable: the worker's own error.
        """
        answer = _parse(message)
        if isinstance(answer, Failure):
            raise _error(answer)
        if isinstance(answer, Part):
            # A second worker splits the text into the same parts, so it is a duplicate.
            return None if answer.index < self._count else self._next(answer)
        if answer.end != self._count:
            raise WrongAnswer("the number of parts is wrong")
        self.ended = True
        return None

    def _next(self, part: Part) -> Wav:
        if part.index > self._count:
            raise WrongAnswer("a part is missing")
        if self._count >= self._most:
            raise WrongAnswer("there are more parts than the text has characters")
        wav = _decode(part)
        if not MIN_RATE <= wav.sample_rate <= MAX_RATE or self._rate not in (None, wav.sample_rate):
            raise WrongAnswer("a part has a wrong sample rate")
        self._bytes += wav.samples.nbytes
        if self._bytes > MAX_SPEECH:
            raise WrongAnswer("the speech is too long")
        self._count, self._rate = self._count + 1, wav.sample_rate
        return wav


def _parse(message: str) -> Part | End | Failure:
    if len(message) > LONGEST_ANSWER:
        raise WrongAnswer("it is too long")
    try:
        return ANSWER.validate_json(message)
    except ValidationError:
        raise WrongAnswer("it is not a message") from None


def _decode(part: Part) -> Wav:
    try:
        return wavs.decode(base64.b64decode(part.wav_b64, validate=True))
    except ValueError:
        raise WrongAnswer("a part is not a WAV") from None


def _error(failure: Failure) -> SidecarError:
    kind = KINDS.get(failure.kind, VoiceUnavailable)
    return kind(failure.error, retry_after=None if kind is InvalidRequest else RETRY_AFTER)

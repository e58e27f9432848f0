"""Messages between sidecars and speech workers: JSON on channels of the event bus.

    worker  -> tts.worker.announced       Announcement, every two seconds
    sidecar -> tts.requested.<worker_id>  SpeechRequest
    sidecar -> tts.cancelled.<worker_id>  Cancellation
    worker  -> tts.spoken.<sidecar_id>    Part 0, Part 1, ... and End; or a Failure

A channel may lose messages. So parts are numbered and announcements list the requests of a worker,
and the sidecar notices what is missing.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter

from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, QueueFull, SidecarError
from llm_sidecar.input_model import InputModel
from llm_sidecar.tts.reference import MAX_REFERENCE_BYTES

ANNOUNCED: Final = "tts.worker.announced"
MAX_TEXT: Final = 100_000
MAX_WAV: Final = 20 << 20
"""Bytes of one part: four minutes at 44.1 kHz."""

Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ReplyChannel = Annotated[str, StringConstraints(pattern=r"^tts\.spoken\.[A-Za-z0-9_-]{1,64}$")]


def requested(worker_id: str) -> str:
    """The channel of a worker's requests."""
    return f"tts.requested.{worker_id}"


def cancelled(worker_id: str) -> str:
    """The channel on which requests to a worker are cancelled."""
    return f"tts.cancelled.{worker_id}"


def spoken(sidecar_id: str) -> str:
    """The channel of answers to a sidecar."""
    return f"tts.spoken.{sidecar_id}"


def base64_length(size: int) -> int:
    """The number of base64 characters for this many bytes."""
    return -(-size // 3) * 4


LONGEST_ANNOUNCEMENT: Final = 1 << 17
LONGEST_REQUEST: Final = base64_length(MAX_REFERENCE_BYTES) + 12 * MAX_TEXT + (1 << 12)
LONGEST_ANSWER: Final = base64_length(MAX_WAV) + (1 << 14)
"""Maximum characters of a message; JSON takes up to twelve for one character of text. A longer
message is refused unparsed."""


class _Message(InputModel):
    # Strict: no value is converted from another type.
    model_config = ConfigDict(frozen=True, strict=True)

    not_text = frozenset({"ref_wav_b64", "wav_b64"})


class Announcement(_Message):
    """A worker is running.

    Attributes:
        waiting: requests that it has, including the one that it speaks.
        requests: their ids; a sidecar's request that is missing was lost.
        leaving: it accepts no more requests.
    """

    worker_id: Id
    # Restricted, because it becomes the value of a header.
    voice: str = Field(pattern=r"^[!-~]{1,64}$")
    clones: bool
    sample_rate: int | None = None
    waiting: int = Field(ge=0)
    # Not strict: JSON has lists, not sets.
    requests: frozenset[Id] = Field(frozenset(), max_length=1000, strict=False)
    leaving: bool = False


class ReplyTo(_Message):
    """The address for the answers to a request, which is enough to refuse an otherwise invalid
    request."""

    request_id: Id
    reply_to: ReplyChannel


class SpeechRequest(ReplyTo):
    """A text to speak, in the voice of the reference if there is one."""

    text: str = Field(max_length=MAX_TEXT)
    exaggeration: float = Field(ge=0, le=2, allow_inf_nan=False)
    ref_wav_b64: str | None = Field(None, max_length=base64_length(MAX_REFERENCE_BYTES))


class Cancellation(_Message):
    """A request that is cancelled."""

    # Otherwise it would match an invalid request.
    model_config = ConfigDict(extra="forbid")

    request_id: Id


class Part(_Message):
    """One part of the speech, a whole WAV file."""

    request_id: Id
    index: int = Field(ge=0)
    wav_b64: str = Field(max_length=base64_length(MAX_WAV))


class End(_Message):
    """The speech is complete.

    Attributes:
        end: the number of its parts.
    """

    request_id: Id
    end: int = Field(ge=0)


class Failure(_Message):
    """The request has failed; no more parts follow.

    Attributes:
        error: the reason, in one sentence.
        kind: the name of the error's class; see `KINDS`.
    """

    request_id: Id
    error: str = Field(max_length=1000)
    kind: str = Field("VoiceUnavailable", max_length=64)


KINDS: Final[dict[str, type[SidecarError]]] = {
    kind.__name__: kind for kind in (InvalidRequest, QueueFull, DeadlineExceeded)
}
"""The errors that a `Failure` keeps the class of; all others become `VoiceUnavailable`."""

Answer = Part | End | Failure

INCOMING: Final[TypeAdapter[SpeechRequest | Cancellation]] = TypeAdapter(
    SpeechRequest | Cancellation
)
ANSWER: Final[TypeAdapter[Answer]] = TypeAdapter(Answer)

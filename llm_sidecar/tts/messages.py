"""Messages between sidecars and speech workers, as JSON: a request, and its answers.

`speech_stream` says where they are in Redis. The answers are Part 0, Part 1, ... and End; or a
Failure, after which nothing follows.
"""

from __future__ import annotations

from typing import Final

from pydantic import ConfigDict, Field, TypeAdapter

from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, QueueFull, SidecarError
from llm_sidecar.input_model import InputModel
from llm_sidecar.tts.reference import MAX_REFERENCE_BYTES

MAX_TEXT: Final = 100_000
MAX_WAV: Final = 20 << 20
"""Bytes of one part: four minutes at 44.1 kHz."""
MAX_SPEECH: Final = 160 << 20
"""Bytes of all parts of a text: half an hour at 44.1 kHz."""


def base64_length(size: int) -> int:
    """The number of base64 characters for this many bytes."""
    return -(-size // 3) * 4


LONGEST_REQUEST: Final = base64_length(MAX_REFERENCE_BYTES) + 12 * MAX_TEXT + (1 << 12)
LONGEST_ANSWER: Final = base64_length(MAX_WAV) + (1 << 14)
"""Maximum characters of a message; JSON takes up to twelve for one character of text. A longer
message is refused unparsed."""


class _Message(InputModel):
    # Strict: no value is converted from another type.
    model_config = ConfigDict(frozen=True, strict=True)

    not_text = frozenset({"ref_wav_b64", "wav_b64"})


class SpeechRequest(_Message):
    """A text to speak, in the voice of the reference if there is one."""

    text: str = Field(max_length=MAX_TEXT)
    exaggeration: float = Field(ge=0, le=2, allow_inf_nan=False)
    ref_wav_b64: str | None = Field(None, max_length=base64_length(MAX_REFERENCE_BYTES))


class Part(_Message):
    """One part of the speech, a whole WAV file."""

    index: int = Field(ge=0)
    wav_b64: str = Field(max_length=base64_length(MAX_WAV))


class End(_Message):
    """The speech is complete.

    Attributes:
        end: the number of its parts.
    """

    end: int = Field(ge=0)


class Failure(_Message):
    """The request has failed.

    Attributes:
        error: the reason, in one sentence.
        kind: the name of the error's class; see `KINDS`.
    """

    error: str = Field(max_length=1000)
    kind: str = Field("VoiceUnavailable", max_length=64)


KINDS: Final[dict[str, type[SidecarError]]] = {
    kind.__name__: kind for kind in (InvalidRequest, QueueFull, DeadlineExceeded)
}
"""The errors that a `Failure` keeps the class of; all others become `VoiceUnavailable`."""

Answer = Part | End | Failure

ANSWER: Final[TypeAdapter[Answer]] = TypeAdapter(Answer)

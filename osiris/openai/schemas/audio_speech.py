"""The request and the events of `/v1/audio/speech`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, Field, StringConstraints

from osiris.openai.schemas.base import MAX_NAME, OpenAIModel

MAX_INPUT: Final = 4096
"""Characters, as in OpenAI's API."""


class SpeechRequest(OpenAIModel):
    """A text to speak."""

    unsupported: ClassVar = {"instructions": ("",), "speed": (1,)}

    model: str = Field(
        min_length=1,
        max_length=MAX_NAME,
        description="ignored: the server has one voice at a time",
        examples=["tts-1"],
    )
    input: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_INPUT)
    ] = Field(
        description="what to say, in English; spaces around it are removed",
        examples=["Take the profit on AAPL: RSI is at 78."],
    )
    voice: str = Field(
        min_length=1,
        max_length=MAX_NAME,
        description="ignored: `X-Voice` of the response names the voice that speaks",
        examples=["alloy"],
    )
    response_format: Literal["wav", "pcm"] = Field(
        "wav",
        description="`wav`: a WAV file at the sample rate of the voice; `pcm`: samples without a "
        "header, 24,000 a second, 16 bits, little-endian, one channel",
        examples=["wav"],
    )
    stream_format: Literal["audio", "sse"] = Field(
        "audio",
        description="`audio`: the whole speech; `sse`: server-sent events with each part of the "
        "text as soon as it is spoken",
        examples=["audio"],
    )


class SpeechUsage(BaseModel):
    """Counts that a voice does not have."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class AudioDelta(BaseModel):
    """A piece of the audio, in base64."""

    type: Literal["speech.audio.delta"] = "speech.audio.delta"
    audio: str


class AudioDone(BaseModel):
    """The end of the audio."""

    type: Literal["speech.audio.done"] = "speech.audio.done"
    usage: SpeechUsage = SpeechUsage()

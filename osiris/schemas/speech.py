"""A text to speak, and the events of the audio stream."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from osiris.schemas.base import RequestBody

MAX_SPEECH: Final = 5_000
"""Characters of one spoken text."""


class SpeakRequest(RequestBody):
    """A text to speak, its expression, and the voice to imitate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text": "Take the profit on AAPL: RSI is at 78.", "exaggeration": 0.5}]
        }
    )

    not_text = frozenset({"ref_wav_b64"})

    text: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_SPEECH)
    ] = Field(
        description="what to say, in English; spaces around it are removed",
        examples=["Take the profit on AAPL: RSI is at 78."],
    )
    exaggeration: float = Field(
        0.5,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="how expressive it is: 0 is flat, 0.5 neutral, 2 theatrical",
        examples=[0.5],
    )
    ref_wav_b64: str | None = Field(
        None,
        description="base64 of a WAV of 1 to 30 s and at most 10 MB, with the voice to imitate; "
        "null for the default voice (the example is only the beginning of one)",
        examples=["UklGRiR9AABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQB9AAA="],
    )


class AudioEvent(BaseModel):
    """One event of `/stream/audio`."""

    event: Literal["lost"] | None = Field(
        None,
        description="absent for a WAV file; `lost`: this listener was too slow and missed some",
        examples=["lost"],
    )
    data: str = Field(
        description="a whole WAV file in base64 (the example is the beginning of one), or the "
        "number of WAV files that were missed",
        examples=["UklGRiQAAABXQVZFZm10IA==", "3"],
    )

"""The interface of voices: text in, one WAV for each part of it out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

AUDIO_BYTES: Final = "audio.bytes"
"""Channel of the event bus; a payload is base64 of one whole WAV."""


class Wav(NamedTuple):
    """Speech: 16-bit samples of one channel, and samples per second."""

    samples: npt.NDArray[np.int16]
    sample_rate: int


class Reference(NamedTuple):
    """A valid voice sample: the WAV file as it was sent, and its length."""

    wav: bytes
    seconds: float


class Voice(Protocol):
    """Speaks one text at a time.

    Attributes:
        name: `chatterbox`, `piper`, `espeak`.
        clones: whether it can clone the voice of a reference.
    """

    name: str
    clones: bool

    def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Speaks a text; an async generator of its parts.

        Args:
            exaggeration: 0 (flat) to 2 (theatrical), 0.5 is neutral.
            reference: a sample of the voice to clone; None for the built-in voice.

        Raises:
            SidecarError: the rest of the text cannot be spoken.
        """
        ...

    async def close(self) -> None:
        """Frees the resources of the voice."""
        ...

"""What every voice is: text in, one WAV for each part of it out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

AUDIO_BYTES: Final = "audio.bytes"
"""Channel of the event bus; a payload is base64 of one whole WAV."""


class Wav(NamedTuple):
    """Speech: 16-bit samples of one channel, and how many of them make a second."""

    samples: npt.NDArray[np.int16]
    sample_rate: int


class Reference(NamedTuple):
    """A decoded, checked voice sample: the whole WAV file as it was sent, and its length."""

    wav: bytes
    seconds: float


class Voice(Protocol):
    """Speaks one text at a time.

    Attributes:
        name: how people call it: `espeak`, `chatterbox`.
        clones: whether it can speak with a reference's voice.
    """

    name: str
    clones: bool

    def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """An async generator of the text's parts, each as soon as it is spoken.

        Args:
            exaggeration: 0 (flat) to 2 (theatrical), 0.5 is neutral.
            reference: whose voice to speak with; None for the voice's own.

        Raises:
            SidecarError: it cannot be spoken; what was yielded before stands.
        """
        ...

    async def close(self) -> None:
        """Frees what the voice holds."""
        ...

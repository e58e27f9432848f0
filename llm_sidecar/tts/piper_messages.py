"""Messages between the server and the process that runs Piper, pickled over a socket pair.

The process sends `Loaded` or `Failed` first, then one `Speech` or `Failed` for each `Speak`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_sidecar.tts.voice import Wav


@dataclass(frozen=True, slots=True)
class Speak:
    """Speaks a part of a text, with an exaggeration from 0 to 2."""

    text: str
    exaggeration: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """The voice is loaded and warm."""


@dataclass(frozen=True, slots=True)
class Speech:
    """A part as speech.

    Attributes:
        wav: empty if the voice has no sound for anything in the part.
        unknown: phonemes without a sound in this voice, which are left out.
    """

    wav: Wav
    unknown: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The voice does not load, or the part cannot be spoken; says why without quoting the part."""

    reason: str

"""Which voices may speak, by preference."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, Literal, Protocol

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts.espeak import EspeakVoice
from llm_sidecar.tts.voice import Reference, Voice, Wav

VoiceChoice = Literal["auto", "chatterbox", "piper", "espeak"]

_NO_REMOTE: Final = (
    "TTS_VOICE=chatterbox needs a Redis that its workers can reach, and REDIS_URL=memory:// is "
    "inside this process: set another REDIS_URL, or TTS_VOICE=auto."
)


class CheckedVoice(Voice, Protocol):
    """A voice that may be unavailable at times."""

    @property
    def unavailable(self) -> str | None:
        """Why it cannot speak now, in one sentence, or None."""
        ...


class NoVoice:
    """Stands for a voice that this configuration does not have."""

    clones = False

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.unavailable: str | None = reason

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Raises VoiceUnavailable."""
        raise VoiceUnavailable(f"{self.unavailable}", retry_after=5)
        yield

    async def close(self) -> None:
        """Nothing to free."""


def choose(
    setting: VoiceChoice, *, remote: CheckedVoice | None, piper: CheckedVoice
) -> list[CheckedVoice]:
    """The voices that a setting allows, the preferred one first.

    Args:
        setting: `auto` allows all: Chatterbox, then Piper, then espeak-ng.
        remote: Chatterbox in its workers; None if no worker can be reached.
        piper: starts only if it speaks.
    """
    voices: dict[VoiceChoice, CheckedVoice] = {
        "chatterbox": remote or NoVoice("chatterbox", _NO_REMOTE),
        "piper": piper,
        "espeak": EspeakVoice(),
    }
    return list(voices.values()) if setting == "auto" else [voices[setting]]

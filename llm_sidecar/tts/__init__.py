"""Text to speech: each part of a text becomes a WAV, which is published on the event bus at
once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_sidecar.tts.chatterbox import ChatterboxTTS

__all__ = ["ChatterboxTTS"]


def __getattr__(name: str) -> Any:
    """Imports the voice when it is used: Piper's process needs neither it nor the event bus."""
    if name != "ChatterboxTTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llm_sidecar.tts.chatterbox import ChatterboxTTS

    return ChatterboxTTS

"""Speech: text to WAVs, part by part, that go out on the event bus as soon as they exist."""

from llm_sidecar.tts.chatterbox import ChatterboxTTS

__all__ = ["ChatterboxTTS"]

"""Speech: a text becomes WAVs, part by part, each published on the event bus at once."""

from llm_sidecar.tts.chatterbox import ChatterboxTTS

__all__ = ["ChatterboxTTS"]

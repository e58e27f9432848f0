"""Text to speech: each part of a text becomes a WAV, which is published on the event bus at
once."""

from llm_sidecar.tts.chatterbox import ChatterboxTTS

__all__ = ["ChatterboxTTS"]

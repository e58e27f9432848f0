"""The routers of all paths under `/v1`."""

from __future__ import annotations

from typing import Final

from osiris.openai import (
    audio_speech,
    chat_completions,
    completions,
    decisions,
    models,
    responses,
)

ROUTERS: Final = (
    chat_completions.router,
    responses.router,
    completions.router,
    decisions.router,
    models.router,
    audio_speech.router,
)

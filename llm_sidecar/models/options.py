"""How each model is loaded on this machine, from the settings."""

from __future__ import annotations

from llm_sidecar.engines.base import Dtype, EngineOptions
from llm_sidecar.settings import Settings


def phi3_options(settings: Settings) -> EngineOptions:
    """How Phi-3 is loaded."""
    return _options(settings, settings.models.phi3_threads)


def hermes_options(settings: Settings) -> EngineOptions:
    """How Hermes is loaded."""
    return _options(settings, settings.models.hermes_threads, settings.models.hermes_dtype)


def _options(settings: Settings, threads: int, dtype: Dtype | None = None) -> EngineOptions:
    models = settings.models
    server = None if models.llama_server is None else str(models.llama_server)
    return EngineOptions(models.device, threads, server, dtype, models.prefill_dtype)

"""Models for the replicas of Ray, with workers whose engine repeats the prompt.

python -m osiris.ray_serve --model tests.fake_ray:make_model
"""

from __future__ import annotations

from llm_sidecar.models.base import ChatModel
from llm_sidecar.models.local import process
from llm_sidecar.models.registry import create_models
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import CallObserver


def make_model(name: str, settings: Settings, observer: CallObserver) -> ChatModel:
    """See `tests.fake_worker`."""
    process._PROGRAM = "tests.fake_worker"  # type: ignore[misc]
    model: ChatModel = getattr(create_models(settings, observer, lambda death: None), name)
    return model

"""The options and the replicas of each model, from the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.engines import EngineOptions
from llm_sidecar.models.options import hermes_options, phi3_options
from llm_sidecar.models.registry import create_models
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import Observers


def test_each_model_has_its_threads_and_only_hermes_a_precision() -> None:
    models = {
        "device": "cpu",
        "phi3_threads": 2,
        "hermes_threads": 3,
        "hermes_dtype": "bfloat16",
        "prefill_dtype": "bfloat16",
        "llama_server": Path("/opt/llama-server"),
    }
    settings = Settings(models=models)
    server = "/opt/llama-server"
    assert phi3_options(settings) == EngineOptions("cpu", 2, server, None, "bfloat16")
    assert hermes_options(settings) == EngineOptions("cpu", 3, server, "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("environ", "replicas"),
    [
        ({}, (0, 0)),
        ({"PHI3_REPLICAS": "2"}, (2, 0)),
        ({"HERMES_REPLICAS": "3"}, (0, 3)),
    ],
)
def test_each_model_has_its_replicas(environ: dict[str, str], replicas: tuple[int, int]) -> None:
    models = create_models(Settings.from_environ(environ), Observers(), lambda death: None)
    assert tuple(len(model.status().replicas) for model in models) == replicas

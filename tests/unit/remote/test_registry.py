"""The models that the settings choose, and settings that depend on them."""

from __future__ import annotations

import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.models import files
from llm_sidecar.models.base import Models
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.registry import create_models
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import Observers

URLS = "http://gpu-1:8000/v1, https://desk:secret@gpu-2.example"


def models(**environ: str) -> Models:
    return create_models(Settings.from_environ(environ), Observers(), lambda death: None)


@pytest.mark.parametrize(
    ("environ", "kinds"),
    [
        ({}, (LocalModel, LocalModel)),
        ({"PHI3_URL": URLS}, (RemoteModel, LocalModel)),
        ({"HERMES_URL": URLS}, (LocalModel, RemoteModel)),
        ({"PHI3_URL": URLS, "HERMES_URL": URLS}, (RemoteModel, RemoteModel)),
    ],
)
def test_a_url_makes_a_model_a_remote_one(
    environ: dict[str, str], kinds: tuple[type, type]
) -> None:
    made = models(**environ)
    assert (type(made.phi3), type(made.hermes)) == kinds


def test_a_url_leaves_no_local_model_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_sidecar.models.registry.LocalModel", None)
    made = models(PHI3_URL=URLS, HERMES_URL=URLS)
    assert (made.phi3.status().state, made.hermes.status().state) == ("loading", "loading")


def test_each_url_is_a_server() -> None:
    status = models(PHI3_URL=URLS, QUEUE_LENGTH="7").phi3.status()
    assert [server.url for server in status.servers] == [
        "http://gpu-1:8000/v1",
        "https://gpu-2.example/v1",
    ]
    assert (status.state, status.queue_length) == ("loading", 7)
    assert "secret" not in repr(status)


def test_what_belongs_to_the_demo_models_does_not_belong_to_others() -> None:
    demo = Settings.from_environ({"SIDECAR_DEMO": "true"})
    remote = Settings.from_environ({"SIDECAR_DEMO": "true", "PHI3_URL": URLS, "HERMES_URL": URLS})
    assert (files.few_shot_examples(demo), files.few_shot_examples(remote)) == (0, 3)
    assert (files.phi3_context_length(demo), files.phi3_context_length(remote)) == (8192, 4096)
    assert hermes_plugin.prompts_for(demo) != hermes_plugin.PROMPTS
    assert hermes_plugin.prompts_for(remote) == hermes_plugin.PROMPTS

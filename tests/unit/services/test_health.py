"""The state of the sidecar, from the states of its components."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.models.base import Adapter, ModelStatus, ReplicaStatus, ServerStatus, Speed
from tests.unit.fakes import FakeSidecar


@pytest.fixture
def fake_sidecar(monkeypatch: pytest.MonkeyPatch) -> FakeSidecar:
    """A sidecar whose components all work."""
    made = FakeSidecar()
    monkeypatch.setattr(made.sidecar.speaker, "available", lambda: True)
    return made


def lose(fake_sidecar: FakeSidecar, *names: str) -> None:
    for name in names:
        if name == "database":
            fake_sidecar.store.full = DatabaseUnavailable("The disk is full.")
        elif name == "closed database":
            fake_sidecar.store.is_away = True
        elif name == "redis":
            fake_sidecar.bus.connected = False
        else:
            model = getattr(fake_sidecar, name)
            model.state = replace(model.state, not_ready=f"{name} is loading.")


@pytest.mark.parametrize(
    ("lost", "status", "missing"),
    [
        ((), "ok", {}),
        (("phi3",), "partial_error", {"phi3": "phi3 is loading."}),
        (("hermes",), "partial_error", {"hermes": "hermes is loading."}),
        (
            ("phi3", "hermes"),
            "error",
            {"phi3": "phi3 is loading.", "hermes": "hermes is loading."},
        ),
        (("database",), "partial_error", {"database": "The disk is full."}),
        # Rows and events wait for these.
        (("closed database",), "partial_error", {}),
        (("redis",), "partial_error", {}),
    ],
)
def test_the_status_follows_from_what_is_missing(
    fake_sidecar: FakeSidecar, lost: tuple[str, ...], status: str, missing: dict[str, str]
) -> None:
    lose(fake_sidecar, *lost)
    health = fake_sidecar.sidecar.health
    assert (health.status(), health.missing()) == (status, missing)
    assert health.report()["status"] == status


def test_without_a_voice_it_is_partial(
    fake_sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_sidecar.sidecar.speaker, "available", lambda: False)
    assert (fake_sidecar.sidecar.health.status(), fake_sidecar.sidecar.health.missing()) == (
        "partial_error",
        {},
    )


def test_a_replica_that_failed_makes_it_partial_and_leaves_it_ready(
    fake_sidecar: FakeSidecar,
) -> None:
    failed = ReplicaStatus("failed", "it ended", None, None, 1)
    fake_sidecar.phi3.state = ModelStatus(
        replicas=(ReplicaStatus("ready", None, None, 7, 0), failed)
    )
    health = fake_sidecar.sidecar.health
    assert (health.status(), health.missing()) == ("partial_error", {})


def test_with_another_adapter_than_the_other_sidecars_it_is_partial(
    fake_sidecar: FakeSidecar,
) -> None:
    fake_sidecar.sidecar.adapters.problem = "It is not there."
    report = fake_sidecar.sidecar.health.report()
    assert (report["status"], report["phi3_adapter_problem"]) == (
        "partial_error",
        "It is not there.",
    )


def test_the_report_shows_each_model_without_its_readiness(fake_sidecar: FakeSidecar) -> None:
    server = ServerStatus(
        url="http://gpu-1/v1",
        state="away",
        reason="it is off",
        model=None,
        outstanding=0,
        schema=None,
        scores=None,
        top_logprobs=None,
        adapters=None,
    )
    fake_sidecar.phi3.state = ModelStatus(
        model="phi3/fake",
        adapter=Adapter(Path("/adapters/20260102")),
        runtime="fake",
        device="cuda",
        pid=7,
        restarts=1,
        completion_tokens_total=40,
        requests=3,
        queue_length=8,
        running=2,
        speed=Speed(128.0, 32.0),
        notes=("the context is cut",),
        servers=(server,),
        replicas=(ReplicaStatus("ready", None, "20260102", 7, 1),),
    )
    fake_sidecar.hermes.state = ModelStatus("failed", "it is not there", "it is not there")
    report = fake_sidecar.sidecar.health.report()
    assert (report["phi3_loaded"], report["hermes_loaded"]) == (True, False)
    assert (report["device"], report["phi3_adapter_date"]) == ("cuda", "2026-01-02")
    expected: dict[str, Any] = {
        "state": "ready",
        "reason": None,
        "model": "phi3/fake",
        "adapter": "20260102",
        "runtime": "fake",
        "device": "cuda",
        "pid": 7,
        "restarts": 1,
        "completion_tokens_total": 40,
        "requests": 3,
        "queue_length": 8,
        "running": 2,
        "speed": {"prefill": 128.0, "decode": 32.0},
        "notes": ["the context is cut"],
        "servers": [asdict(server)],
        "replicas": [
            {"state": "ready", "reason": None, "adapter": "20260102", "pid": 7, "restarts": 1}
        ],
    }
    shown = report["models"]
    assert (shown["phi3"], list(shown["phi3"])) == (expected, list(expected))
    assert (shown["hermes"]["state"], shown["hermes"]["reason"]) == ("failed", "it is not there")
    assert list(shown["hermes"]) == list(expected)


def test_the_report_has_the_mean_score_and_the_states_of_the_parts(
    fake_sidecar: FakeSidecar,
) -> None:
    rows = fake_sidecar.sidecar._rows
    rows.mean_score, rows.num_scores = 0.25, 4
    report = fake_sidecar.sidecar.health.report()
    assert report["mean_hermes_score_last_24h"] == 0.25
    assert report["num_hermes_scores_last_24h"] == 4
    assert report["database"] == {"state": "fake"}
    assert report["event_bus"] == {"state": "fake", "listeners": 0}
    assert (report["device"], report["phi3_adapter_date"]) == ("auto", None)

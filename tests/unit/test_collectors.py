"""Metrics that are read from the state of the sidecar."""

from __future__ import annotations

from llm_sidecar.models.base import ModelStatus, ReplicaStatus
from llm_sidecar.telemetry.collectors import HealthCollector
from tests.unit.fakes import FakeSidecar


def test_replicas_are_counted_by_their_state() -> None:
    made = FakeSidecar()
    replicas = [ReplicaStatus(state, None, None, None, 0) for state in ("ready", "failed", "ready")]
    made.phi3.state = ModelStatus(replicas=tuple(replicas))
    # It has no others.
    made.hermes.state = ModelStatus("loading")
    collector = HealthCollector()
    collector.health = made.sidecar.health.report
    family = next(one for one in collector.collect() if one.name == "sidecar_model_replicas")
    found = {(one.labels["model"], one.labels["state"]): one.value for one in family.samples}
    assert {labels: count for labels, count in found.items() if count} == {
        ("phi3", "ready"): 2,
        ("phi3", "failed"): 1,
        ("hermes", "loading"): 1,
    }

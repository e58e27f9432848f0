"""The state of a model with several replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_sidecar.models.base import Adapter, ModelStatus, ReplicaStatus, Speed
from llm_sidecar.models.replica_status import combined

READY = ModelStatus(
    state="ready",
    model="phi3/fake",
    adapter=Adapter(Path("/adapters/20260102")),
    runtime="fake",
    device="cpu",
    pid=7,
    restarts=1,
    completion_tokens_total=40,
    speed=Speed(14.0, 4.0),
)
FAILED = ModelStatus(
    state="failed", reason="it ended", not_ready="it ended", restarts=2, completion_tokens_total=40
)
LOADING = ModelStatus(state="loading", not_ready="It is loading.", completion_tokens_total=40)
UNLOADED = ModelStatus(state="unloaded")
MISSING = ModelStatus(state="failed", reason="It is missing.", not_ready="It is missing.")


def test_a_model_serves_as_its_first_replica_that_serves() -> None:
    other = replace(READY, pid=8, restarts=0)
    assert combined([FAILED, READY, other]) == replace(
        READY,
        restarts=3,
        replicas=(
            ReplicaStatus("failed", "it ended", None, None, 2),
            ReplicaStatus("ready", None, "20260102", 7, 1),
            ReplicaStatus("ready", None, "20260102", 8, 0),
        ),
    )


@pytest.mark.parametrize(
    ("statuses", "state", "not_ready"),
    [
        ([READY, FAILED], "ready", None),
        ([FAILED, LOADING], "loading", "It is loading."),
        ([FAILED, MISSING], "failed", "it ended"),
        # The next one has not begun to load, which does not make the model ready.
        ([LOADING, UNLOADED], "loading", "It is loading."),
        ([FAILED, UNLOADED], "failed", "it ended"),
        ([UNLOADED, UNLOADED], "unloaded", None),
        ([MISSING, MISSING], "failed", "It is missing."),
    ],
)
def test_the_state_is_the_best_of_those_that_have_begun_to_load(
    statuses: list[ModelStatus], state: str, not_ready: str | None
) -> None:
    status = combined(statuses)
    assert (status.state, status.not_ready) == (state, not_ready)


def test_a_first_load_that_requests_wait_for_is_ready() -> None:
    lazy = replace(LOADING, not_ready=None)
    assert combined([lazy, UNLOADED]).not_ready is None
    assert combined([FAILED, lazy]).not_ready is None

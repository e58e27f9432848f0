"""The state of a model with several replicas, from the states of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from llm_sidecar.models.status import ModelStatus, ReplicaStatus, State

_STATES: Final[tuple[State, ...]] = ("ready", "loading", "failed", "unloaded")
"""The state of the model is the first of these that a replica has."""


def combined(statuses: Sequence[ModelStatus]) -> ModelStatus:
    """The state of the model, without the counts of requests.

    The model serves if one replica serves. `restarts` is the sum. Everything else, such as pid and
    speed, is that of the first replica that serves.

    Args:
        statuses: of each replica, at least one. In each, `completion_tokens_total` is already that
            of all replicas.
    """
    # One that has not begun to load says nothing about the others.
    begun = [status for status in statuses if status.state != "unloaded"] or statuses
    first = min(begun, key=lambda status: _STATES.index(status.state))
    ready = any(status.not_ready is None for status in begun)
    return replace(
        first,
        not_ready=None if ready else first.not_ready,
        restarts=sum(status.restarts for status in statuses),
        replicas=tuple(_replica(status) for status in statuses),
    )


def _replica(status: ModelStatus) -> ReplicaStatus:
    return ReplicaStatus(
        status.state,
        status.reason,
        None if status.adapter is None else status.adapter.name,
        status.pid,
        status.restarts,
    )

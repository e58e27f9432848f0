"""Metrics that are read from the state of the sidecar at every scrape."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llm_sidecar.telemetry.plain_metrics import EVENT_BUS, INBOX, JOURNAL, NO_INBOX, ROWS, SPEECH

Health = Mapping[str, Any]
"""The result of `Health.report`."""

_MODEL_STATES: Final = ("unloaded", "loading", "ready", "failed")
_DATABASE_STATES: Final = ("opening", "open", "away", "closed")


class HealthCollector(Collector):
    """Reads the state of every component of the sidecar.

    Attributes:
        health: returns the state; None until there is a sidecar, which means no metrics.
    """

    def __init__(self) -> None:
        self.health: Callable[[], Health] | None = None

    def collect(self) -> Iterable[Metric]:
        """Yields every metric of every component."""
        if self.health is None:
            return
        health = self.health()
        yield from _models(health["models"])
        yield from _forecast(health["forecast"])
        yield from _scores(health)
        yield from _event_bus(health["event_bus"])
        yield from _database(health["database"])
        yield from _speech(health["speech"])


def _models(models: Mapping[str, Health]) -> Iterator[Metric]:
    by_model = ["model"]
    running = GaugeMetricFamily(
        "sidecar_requests_running",
        "Calls that a worker is running: up to 8, on onnxruntime-genai 1.",
        labels=by_model,
    )
    waiting = GaugeMetricFamily(
        "sidecar_requests_waiting",
        "Calls that wait for their turn or for the model to load.",
        labels=by_model,
    )
    limit = GaugeMetricFamily(
        "sidecar_requests_limit",
        "Calls that may run and wait at once: QUEUE_LENGTH.",
        labels=by_model,
    )
    restarts = CounterMetricFamily(
        "sidecar_worker_restarts",
        "Times that a worker of the model died or could not be started.",
        labels=by_model,
    )
    for name, status in models.items():
        running.add_metric([name], status["running"])
        waiting.add_metric([name], status["requests"] - status["running"])
        limit.add_metric([name], status["queue_length"])
        restarts.add_metric([name], status["restarts"])
    yield from (running, waiting, limit, restarts)
    yield _state_of_models(models)
    yield _replicas_of_models(models)
    yield _info_of_models(models)
    yield _speed_of_models(models)


def _state_of_models(models: Mapping[str, Health]) -> Metric:
    states = GaugeMetricFamily(
        "sidecar_model_state",
        "1 for the state that a model is in, 0 for the others.",
        labels=["model", "state"],
    )
    for name, status in models.items():
        for state in _MODEL_STATES:
            states.add_metric([name, state], status["state"] == state)
    return states


def _replicas_of_models(models: Mapping[str, Health]) -> Metric:
    replicas = GaugeMetricFamily(
        "sidecar_model_replicas",
        "Replicas of a model in each state: PHI3_REPLICAS, HERMES_REPLICAS.",
        labels=["model", "state"],
    )
    for name, status in models.items():
        found = [replica["state"] for replica in status["replicas"] or [status]]
        for state in _MODEL_STATES:
            replicas.add_metric([name, state], found.count(state))
    return replicas


def _info_of_models(models: Mapping[str, Health]) -> Metric:
    info = GaugeMetricFamily(
        "sidecar_model_info",
        "1 for the model that is loaded and its adapter. Absent while none is loaded.",
        labels=["model", "served_by", "runtime", "device", "adapter"],
    )
    for name, status in models.items():
        if status["model"] is not None:
            labels = (status["model"], status["runtime"], status["device"], status["adapter"])
            info.add_metric([name, *(label or "" for label in labels)], 1)
    return info


def _speed_of_models(models: Mapping[str, Health]) -> Metric:
    speed = GaugeMetricFamily(
        "sidecar_model_tokens_per_second",
        "Speed of one request in each phase, `prefill` and `decode`, measured when the model was "
        "loaded. Absent while none is loaded.",
        labels=["model", "phase"],
    )
    for name, status in models.items():
        for phase, value in (status["speed"] or {}).items():
            speed.add_metric([name, phase], value)
    return speed


def _forecast(forecast: Health) -> Iterator[Metric]:
    parts = [forecast[f"{part}_seconds"] for part in ("proposal", "critique", "score")]
    if None not in parts:
        yield GaugeMetricFamily(
            "sidecar_forecast_of_timeout_ratio",
            "What a proposal, its critique and its score will take, as a share of "
            "REQUEST_TIMEOUT_SECONDS. Absent until both models are loaded.",
            sum(parts) / forecast["timeout_seconds"],
        )


def _scores(health: Health) -> Iterator[Metric]:
    mean = health["mean_hermes_score_last_24h"]
    if mean is not None:
        yield GaugeMetricFamily(
            "sidecar_mean_hermes_score_last_24h",
            "Mean score of the last 24 hours in the database. Absent without a score.",
            mean,
        )
    yield GaugeMetricFamily(
        "sidecar_hermes_scores_last_24h",
        "Number of scores of the last 24 hours in the database.",
        health["num_hermes_scores_last_24h"],
    )


def _event_bus(status: Health) -> Iterator[Metric]:
    yield from _plain("sidecar_event_bus", EVENT_BUS, status)
    yield from _plain("sidecar_event_bus", INBOX, status["inbox"] or NO_INBOX)
    yield GaugeMetricFamily(
        "sidecar_event_bus_failing",
        "1 while Redis is connected but accepts no events, else 0.",
        status["failing"] is not None,
    )
    yield GaugeMetricFamily(
        "sidecar_event_bus_denied",
        "Operations that the access rules of Redis deny to the sidecar.",
        len(status["denied"]),
    )
    yield GaugeMetricFamily(
        "sidecar_event_bus_warnings",
        "Options with which this Redis may lose acknowledged writes.",
        len(status["warnings"]),
    )


def _database(status: Health) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "sidecar_database_state",
        "1 for the state that the database is in, 0 for the others.",
        labels=["state"],
    )
    for state in _DATABASE_STATES:
        states.add_metric([state], status["state"] == state)
    yield states
    fragments = GaugeMetricFamily(
        "sidecar_database_fragments",
        "Fragments of a table. Compaction starts at 32.",
        labels=["table"],
    )
    for table, count in status["fragments"].items():
        fragments.add_metric([table], count)
    yield fragments
    yield from _plain("sidecar_database", ROWS, status)
    yield from _plain("sidecar_database_journal", JOURNAL, status["journal"])
    yield from _compaction(status)


def _compaction(status: Health) -> Iterator[Metric]:
    if status["last_compaction"] is not None:
        last = datetime.datetime.fromisoformat(status["last_compaction"])
        age = datetime.datetime.now(datetime.UTC) - last
        yield GaugeMetricFamily(
            "sidecar_database_since_compaction_seconds",
            "Time since a process of this machine last compacted. Absent before that.",
            max(0.0, age.total_seconds()),
        )
    yield GaugeMetricFamily(
        "sidecar_database_compaction_failing",
        "1 if the last compaction failed, else 0.",
        status["compaction_failure"] is not None,
    )
    yield CounterMetricFamily(
        "sidecar_database_compaction_failures",
        "Compactions that failed.",
        status["compaction_failures"],
    )


def _speech(status: Health) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "sidecar_speech_available",
        "1 while a voice can speak, else 0.",
        status["state"] == "ready",
    )
    voice = GaugeMetricFamily(
        "sidecar_speech_voice", "1 for the voice of the next text.", labels=["voice"]
    )
    if status["voice"] is not None:
        voice.add_metric([status["voice"]], 1)
    yield voice
    yield GaugeMetricFamily(
        "sidecar_speech_workers", "Chatterbox workers on the same Redis.", len(status["workers"])
    )
    yield from _plain("sidecar_speech", SPEECH, status)


def _plain(
    prefix: str, table: Iterable[tuple[type[Metric], str, str, str]], status: Health
) -> Iterator[Metric]:
    for family, name, key, text in table:
        yield family(f"{prefix}_{name}", text, status[key])

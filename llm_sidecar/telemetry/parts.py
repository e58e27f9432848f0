"""What the parts of a sidecar know of themselves, as metrics that are read at every scrape."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Health = Mapping[str, Any]
"""What `Sidecar.health` returns."""

_MODEL_STATES: Final = ("unloaded", "loading", "ready", "failed")
_DATABASE_STATES: Final = ("opening", "open", "away", "closed")

_EVENT_BUS: Final = (
    (GaugeMetricFamily, "connected", "connected", "Whether Redis is there: 1, or 0."),
    (CounterMetricFamily, "outages", "outages", "Times that Redis went away."),
    (CounterMetricFamily, "away_seconds", "seconds_away", "Time that Redis was away."),
    (CounterMetricFamily, "published", "published", "Messages that Redis took."),
    (CounterMetricFamily, "published_late", "published_late", "Those that had to wait for Redis."),
    (GaugeMetricFamily, "waiting", "waiting", "Messages that wait for Redis."),
    (CounterMetricFamily, "unpublished", "unpublished", "Messages that Redis never took."),
    (CounterMetricFamily, "handler_errors", "handler_errors", "Messages whose handler failed."),
    (CounterMetricFamily, "refused", "refused", "Invalid messages that were refused."),
    (CounterMetricFamily, "dropped", "dropped", "Messages that a slow listener lost."),
)
_SPEECH: Final = (
    (GaugeMetricFamily, "requests_waiting", "waiting", "Texts that are spoken and wait."),
    (CounterMetricFamily, "spoken", "spoken", "Texts spoken."),
    (GaugeMetricFamily, "listeners", "listeners", "Listeners of the audio stream."),
    (CounterMetricFamily, "lost", "lost", "Parts of speech that a slow listener lost."),
)


class PartsCollector(Collector):
    """Asks for the state of the parts whenever it is collected.

    Attributes:
        health: what to ask; None, and nothing is collected, before there is a sidecar.
    """

    def __init__(self) -> None:
        self.health: Callable[[], Health] | None = None

    def collect(self) -> Iterable[Metric]:
        """Every metric of every part."""
        if self.health is None:
            return
        health = self.health()
        yield from _models(health["models"])
        yield from _scores(health)
        yield from _plain("sidecar_event_bus", _EVENT_BUS, health["event_bus"])
        yield from _database(health["database"])
        yield from _speech(health["speech"])


def _models(models: Mapping[str, Health]) -> Iterator[Metric]:
    by_model = ["model"]
    running = GaugeMetricFamily(
        "sidecar_requests_running", "Calls that a model's worker has.", labels=by_model
    )
    waiting = GaugeMetricFamily(
        "sidecar_requests_waiting", "Calls that wait for a model.", labels=by_model
    )
    limit = GaugeMetricFamily(
        "sidecar_requests_limit", "Calls that may run and wait at once.", labels=by_model
    )
    restarts = CounterMetricFamily(
        "sidecar_worker_restarts", "Times that a model's worker ended by itself.", labels=by_model
    )
    for name, status in models.items():
        running.add_metric([name], status["running"])
        waiting.add_metric([name], status["requests"] - status["running"])
        limit.add_metric([name], status["queue_length"])
        restarts.add_metric([name], status["restarts"])
    yield from (running, waiting, limit, restarts)
    yield _state_of_models(models)
    yield _info_of_models(models)


def _state_of_models(models: Mapping[str, Health]) -> Metric:
    states = GaugeMetricFamily(
        "sidecar_model_state", "1 for the state that a model is in.", labels=["model", "state"]
    )
    for name, status in models.items():
        for state in _MODEL_STATES:
            states.add_metric([name, state], status["state"] == state)
    return states


def _info_of_models(models: Mapping[str, Health]) -> Metric:
    info = GaugeMetricFamily(
        "sidecar_model_info",
        "1 for what each loaded model is, and the adapter it uses.",
        labels=["model", "served_by", "runtime", "device", "adapter"],
    )
    for name, status in models.items():
        if status["model"] is not None:
            labels = (status["model"], status["runtime"], status["device"], status["adapter"])
            info.add_metric([name, *(label or "" for label in labels)], 1)
    return info


def _scores(health: Health) -> Iterator[Metric]:
    mean = health["mean_hermes_score_last_24h"]
    if mean is not None:
        yield GaugeMetricFamily(
            "sidecar_mean_hermes_score_last_24h",
            "Mean of the scores of the last 24 hours, of every sidecar on the database.",
            mean,
        )
    yield GaugeMetricFamily(
        "sidecar_hermes_scores_last_24h",
        "How many scores that mean is of.",
        health["num_hermes_scores_last_24h"],
    )


def _database(status: Health) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "sidecar_database_state", "1 for the state that the database is in.", labels=["state"]
    )
    for state in _DATABASE_STATES:
        states.add_metric([state], status["state"] == state)
    yield states
    fragments = GaugeMetricFamily(
        "sidecar_database_fragments", "Pieces that a table is in.", labels=["table"]
    )
    for table, count in status["fragments"].items():
        fragments.add_metric([table], count)
    yield fragments
    yield from _rows_and_log(status)
    yield from _compaction(status)


def _rows_and_log(status: Health) -> Iterator[Metric]:
    log = status["log"]
    yield CounterMetricFamily(
        "sidecar_database_rows_written", "Rows acknowledged.", status["rows_written"]
    )
    yield GaugeMetricFamily(
        "sidecar_database_rows_waiting",
        "Rows in the write-ahead log and not yet in their tables.",
        status["rows_waiting"],
    )
    yield GaugeMetricFamily(
        "sidecar_database_log_bytes", "Size of the rows that wait in the log.", log["bytes"]
    )
    yield GaugeMetricFamily(
        "sidecar_database_log_limit_bytes",
        "Size of the waiting rows from which the log takes no more.",
        log["most_bytes"],
    )
    yield GaugeMetricFamily(
        "sidecar_database_log_accepts_rows",
        "Whether the log takes rows: 1, or 0.",
        log["accepts_rows"],
    )


def _compaction(status: Health) -> Iterator[Metric]:
    if status["last_compaction"] is not None:
        last = datetime.datetime.fromisoformat(status["last_compaction"])
        age = datetime.datetime.now(datetime.UTC) - last
        yield GaugeMetricFamily(
            "sidecar_database_since_compaction_seconds",
            "Time since any process of this machine last compacted the tables.",
            max(0.0, age.total_seconds()),
        )
    yield GaugeMetricFamily(
        "sidecar_database_compaction_failing",
        "Whether the last compaction failed: 1, or 0.",
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
        "Whether a voice can speak: 1, or 0.",
        status["state"] == "ready",
    )
    yield GaugeMetricFamily(
        "sidecar_speech_workers", "Speech workers that are there.", len(status["workers"])
    )
    yield from _plain("sidecar_speech", _SPEECH, status)


def _plain(
    prefix: str, table: Iterable[tuple[type[Metric], str, str, str]], status: Health
) -> Iterator[Metric]:
    for family, name, key, text in table:
        yield family(f"{prefix}_{name}", text, status[key])

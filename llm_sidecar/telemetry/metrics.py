"""The Prometheus metrics of one sidecar, in a separate registry.

    metrics = Metrics(tables=("proposals",), fields=("ticker",))
    sidecar = Sidecar(settings, metrics=metrics)
    metrics.watch(sidecar.health.report)
    metrics.render()

Events are counted as they happen; `telemetry.collectors` reads the components' own counts at every
scrape. The names are vLLM's with the prefix `sidecar_`
(https://docs.vllm.ai/en/stable/usage/metrics.html), and for HTTP those of
prometheus-fastapi-instrumentator. Every label value comes from a fixed set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    exposition,
)

from llm_sidecar.telemetry.asgi import known_method
from llm_sidecar.telemetry.calls import CANCELLED, UNEXPECTED, ModelCall, Observers
from llm_sidecar.telemetry.collectors import HealthCollector

CONTENT_TYPE: Final = exposition.CONTENT_TYPE_PLAIN_0_0_4
"""The content type of the result of `Metrics.render`."""

REQUEST_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
"""From a score of the demo model to the longest deadline in use."""
QUEUE_SECONDS: Final = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
FIRST_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
TOKEN_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
HTTP_SECONDS: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SCORES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of scores, and of their answer mass."""

MODELS: Final = ("phi3", "hermes")
SCORE: Final = "score"
"""The finish reason of a call that scores choices and generates no text."""
_FINISH_REASONS: Final = ("stop", "length", "deadline", SCORE)
_ERRORS: Final = (
    "QueueFull",
    "ModelUnavailable",
    "DeadlineExceeded",
    "InvalidRequest",
    CANCELLED,
    UNEXPECTED,
)
_ACTIONS: Final = ("adjust", "pass", "abort")


class MetricsSink(Observers):
    """The interface of the metrics; this base class counts nothing."""

    def watch(self, health: Callable[[], Mapping[str, Any]]) -> None:
        """Sets the function that returns the state of the components: `Health.report`."""

    def proposed(self, action: str, ungrounded: Sequence[str]) -> None:
        """A valid proposal was made, with these fields not grounded in its context."""

    def scored(self, score: float, answer_mass: float, *, reliable: bool) -> None:
        """Hermes has scored a proposal; both numbers are in [0, 1]."""

    def row_lost(self, table: str) -> None:
        """A row of a run, a proposal or a score could not be stored."""

    def replayed(self) -> None:
        """A request got the kept answer of an earlier one."""


class Metrics(MetricsSink):
    """The metrics of one sidecar."""

    def __init__(self, *, tables: Sequence[str], fields: Sequence[str]) -> None:
        """Defines every metric.

        Args:
            tables: the values that `row_lost` takes.
            fields: the ungrounded fields that `proposed` takes.
        """
        # Process-wide: a creation time for each counter would double the output.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._state = HealthCollector()
        self._registry.register(self._state)
        self._define_calls()
        self._define_proposals(fields)
        self._define_rows(tables)
        self._define_http()

    def watch(self, health: Callable[[], Mapping[str, Any]]) -> None:
        """Sets the function that returns the state of the components: `Health.report`."""
        self._state.health = health

    def render(self) -> bytes:
        """Everything in Prometheus' text format, version 0.0.4."""
        return exposition.generate_latest(self._registry)

    def proposed(self, action: str, ungrounded: Sequence[str]) -> None:
        """A valid proposal was made, with these fields not grounded in its context."""
        self._proposals.labels(action).inc()
        for field in ungrounded:
            self._ungrounded.labels(field).inc()

    def scored(self, score: float, answer_mass: float, *, reliable: bool) -> None:
        """Hermes has scored a proposal; both numbers are in [0, 1]."""
        self._answer_mass.observe(answer_mass)
        if reliable:
            self._scores.observe(score)
        else:
            self._unreliable_scores.inc()

    def row_lost(self, table: str) -> None:
        """A row of a run, a proposal or a score could not be stored."""
        self._rows_lost.labels(table).inc()

    def replayed(self) -> None:
        """A request got the kept answer of an earlier one."""
        self._replays.inc()

    def call_started(self, call: ModelCall) -> None:
        """Does nothing: the models report how many calls run and wait."""

    def call_finished(self, call: ModelCall) -> None:
        """Counts the call and its tokens, and records its times."""
        model = call.model
        self._prompt_tokens.labels(model).inc(call.prompt_tokens)
        self._cached_tokens.labels(model).inc(call.cached_tokens)
        self._generation_tokens.labels(model).inc(call.completion_tokens)
        if call.begun is not None:
            self._queue_time.labels(model).observe(call.begun - call.queued)
        if call.first_token is not None:
            self._first_token.labels(model).observe(call.first_token - call.queued)
        between_tokens = self._between_tokens.labels(model)
        for seconds, tokens in call.steps:
            between_tokens.observe(seconds / tokens)
        if call.error is not None:
            self._errors.labels(model, call.error).inc()
        elif call.finished is not None:
            self._latency.labels(model).observe(call.finished - call.queued)
            self._successes.labels(model, call.finish_reason or SCORE).inc()

    def answered(self, method: str, status: int, handler: str, seconds: float) -> None:
        """An HTTP request was answered.

        Args:
            method: the request's method; it can be any text.
            status: of the response.
            handler: the route's template, or `none` without a route.
            seconds: until the response started.
        """
        method = known_method(method)
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._durations.labels(method, handler).observe(seconds)

    def _define_calls(self) -> None:
        self._latency = self._histogram(
            "sidecar_e2e_request_latency_seconds",
            "Time from asking a model to its complete answer. Only answered calls count.",
            REQUEST_SECONDS,
        )
        self._queue_time = self._histogram(
            "sidecar_request_queue_time_seconds",
            "Time from asking a model until its worker starts the call, loading included.",
            QUEUE_SECONDS,
        )
        self._first_token = self._histogram(
            "sidecar_time_to_first_token_seconds",
            "Time from asking a model to the first token of its answer.",
            FIRST_TOKEN_SECONDS,
        )
        self._between_tokens = self._histogram(
            "sidecar_inter_token_latency_seconds",
            "Time per token after the first. A worker reports one value every 20 ms at most.",
            TOKEN_SECONDS,
        )
        self._prompt_tokens = self._counter(
            "sidecar_prompt_tokens", "Prompt tokens of generations. Scores do not count."
        )
        self._cached_tokens = self._counter(
            "sidecar_prefix_cache_hits",
            "Prompt tokens whose prefill was reused from an earlier prompt.",
        )
        self._generation_tokens = self._counter(
            "sidecar_generation_tokens", "Tokens generated, those of cancelled calls included."
        )
        self._successes = self._counter(
            "sidecar_request_success",
            "Answered calls of a model by their finish reason.",
            finish_reason=_FINISH_REASONS,
        )
        self._errors = self._counter(
            "sidecar_request_errors",
            "Calls of a model without an answer, by the kind of error.",
            error=_ERRORS,
        )

    def _define_proposals(self, fields: Sequence[str]) -> None:
        self._proposals = Counter(
            "sidecar_proposals",
            "Valid proposals by their action.",
            ["action"],
            registry=self._registry,
        )
        for action in _ACTIONS:
            self._proposals.labels(action)
        self._ungrounded = Counter(
            "sidecar_ungrounded_proposals",
            "Valid proposals with an ungrounded field. With GROUNDING=retry, after the retry.",
            ["field"],
            registry=self._registry,
        )
        for field in fields:
            self._ungrounded.labels(field)
        self._scores = Histogram(
            "sidecar_hermes_score",
            "Scores that this sidecar's Hermes gave, from 0 to 1, without unreliable ones.",
            buckets=SCORES,
            registry=self._registry,
        )
        self._answer_mass = Histogram(
            "sidecar_hermes_answer_mass",
            "Probability of the answers 0 to 10 in total, of each score, unreliable ones included.",
            buckets=SCORES,
            registry=self._registry,
        )
        self._unreliable_scores = Counter(
            "sidecar_unreliable_hermes_scores",
            "Scores whose answer mass was below MIN_ANSWER_MASS.",
            registry=self._registry,
        )

    def _define_rows(self, tables: Sequence[str]) -> None:
        self._rows_lost = Counter(
            "sidecar_database_rows_lost",
            "Rows of runs, proposals and scores that could not be stored.",
            ["table"],
            registry=self._registry,
        )
        for table in tables:
            self._rows_lost.labels(table)

    def _define_http(self) -> None:
        self._requests = Counter(
            "http_requests",
            "HTTP requests answered, by method, status class and route.",
            ["method", "status", "handler"],
            registry=self._registry,
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Time until an HTTP response began.",
            ["method", "handler"],
            buckets=HTTP_SECONDS,
            registry=self._registry,
        )
        self._replays = Counter(
            "http_idempotent_replays",
            "Requests that got the kept answer of an earlier one with the same Idempotency-Key.",
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, ["model"], buckets=buckets, registry=self._registry)
        for model in MODELS:
            made.labels(model)
        return made

    def _counter(self, name: str, text: str, **label: tuple[str, ...]) -> Counter:
        """A counter by model and at most one more label.

        Every series exists from the start, because a rate does not see the step from nothing to 1.
        """
        made = Counter(name, text, ["model", *label], registry=self._registry)
        for model in MODELS:
            for value in next(iter(label.values()), (None,)):
                made.labels(*filter(None, (model, value)))
        return made

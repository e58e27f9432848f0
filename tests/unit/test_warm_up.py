"""What a worker does while it loads its model: it measures the speed, and warms up what requests
need."""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.engines import Delta, EngineOptions, GenerationRequest
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.base import Speed
from llm_sidecar.models.local import warm_up
from llm_sidecar.models.local.protocol import Load

SYSTEM = {"role": "system", "content": "Propose."}
PREFIX = GenerationRequest([SYSTEM], 248, "{}", 0.5)
HELLO = {"role": "user", "content": "Hello."}


class TimedEngine:
    """An engine whose steps take fixed times of a clock of its own.

    Attributes:
        now: of its clock.
        failure: raised by `prefill`, if it is set.
        asked: the requests of `prefill` and `stream`.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.failure: Exception | None = None
        self.asked: list[GenerationRequest] = []

    def clock(self) -> float:
        return self.now

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        assert not header
        return list(range(40))

    def decode_steps(self, count: int) -> Generator[None]:
        """The weights are read in 9 s, and each step takes half a second."""
        self.now += 9.0
        yield
        for _ in range(count):
            self.now += 0.5
            yield

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        """Two steps of 5 s."""
        self.asked.append(request)
        for _ in range(2):
            if self.failure is not None:
                raise self.failure
            self.now += 5.0
            yield

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        self.asked.append(request)
        self.now += 70.0
        yield Delta("", 3, 1, finish_reason="length")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TimedEngine:
    made = TimedEngine()

    def load_engine(folder: Path, **options: Any) -> TimedEngine:
        assert folder == Path("/models/phi3")
        assert options == {
            "device": "cpu",
            "threads": 3,
            "adapter": Path("/adapters/20260102"),
            "llama_server": None,
            "dtype": None,
            "prefill_dtype": "off",
        }
        return made

    monkeypatch.setattr(warm_up, "load_engine", load_engine)
    return made


def load(engine: TimedEngine, prefix: GenerationRequest | None) -> Speed | None:
    message = Load("/models/phi3", EngineOptions("cpu", 3), "/adapters/20260102", prefix)
    loaded, speed = warm_up.load_warm(message, engine.clock)
    assert loaded is engine  # type: ignore[comparison-overlap]
    return speed


def test_the_speed_is_that_of_the_prefix_and_of_decode_steps(engine: TimedEngine) -> None:
    # 40 tokens in 10 s, and a token in half a second: reading the weights does not count.
    assert load(engine, PREFIX) == Speed(prefill=4.0, decode=2.0)
    first, second = engine.asked
    assert first == GenerationRequest([SYSTEM], 248, "{}", 0.5, tokens=list(range(40)))
    assert second == GenerationRequest([SYSTEM, HELLO], 1, "{}")


def test_without_a_prefix_there_is_no_speed(engine: TimedEngine) -> None:
    assert load(engine, None) is None
    assert engine.asked == [GenerationRequest([HELLO], 1)]


@pytest.mark.parametrize(
    ("failure", "level", "message"),
    [
        (
            InvalidRequest("prompt: it is too long"),
            logging.WARNING,
            "the few-shot examples do not fit the context, so they are not prefilled",
        ),
        (RuntimeError("secret"), logging.ERROR, "a prefix could not be prefilled: RuntimeError"),
    ],
)
def test_a_prefix_that_fails_is_logged_and_the_model_serves_without_a_speed(
    engine: TimedEngine,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
    level: int,
    message: str,
) -> None:
    engine.failure = failure
    assert load(engine, PREFIX) is None
    assert engine.asked[1] == GenerationRequest([HELLO], 1, "{}")
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [(level, message)]


def test_a_clock_that_stands_still_gives_a_speed(engine: TimedEngine) -> None:
    message = Load("/models/phi3", EngineOptions("cpu", 3), "/adapters/20260102", PREFIX)
    _, speed = warm_up.load_warm(message, lambda: 7.0)
    assert speed == Speed(prefill=40e6, decode=4e6)

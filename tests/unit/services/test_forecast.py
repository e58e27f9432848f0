"""What a proposal will take, from the speeds of two models."""

from __future__ import annotations

import logging

import pytest

from llm_sidecar.models.base import Models, ModelStatus, Speed
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.services.forecast import Forecast
from llm_sidecar.settings import Settings
from tests.unit.fakes import FakeSidecar

FAST = Speed(prefill=128.0, decode=32.0)
SLOW = Speed(prefill=16.0, decode=4.0)


def models(phi3: Speed | None, hermes: Speed | None) -> Models:
    made = Models(FakeModel(), FakeModel())
    for model, speed in zip(made, (phi3, hermes), strict=True):
        assert isinstance(model, FakeModel)
        model.state = ModelStatus(speed=speed)
    return made


def test_each_part_takes_the_time_of_its_tokens() -> None:
    # 256 + 96 tokens of Phi-3; 352 + 100 and 32 + 2 of Hermes.
    forecast = Forecast.of(models(FAST, SLOW), critique_tokens=100)
    assert forecast == Forecast(proposal=5.0, critique=47.0, score=2.5)
    assert forecast.total == 54.5


@pytest.mark.parametrize(
    ("phi3", "hermes", "expected"),
    [
        (None, None, Forecast(None, None, None)),
        (FAST, None, Forecast(5.0, None, None)),
        (None, SLOW, Forecast(None, 86.0, 2.5)),
    ],
)
def test_what_is_not_measured_is_unknown(
    phi3: Speed | None, hermes: Speed | None, expected: Forecast
) -> None:
    forecast = Forecast.of(models(phi3, hermes), critique_tokens=256)
    assert forecast == expected
    assert forecast.total is None
    assert forecast.warning(0.001) is None


@pytest.mark.parametrize(
    ("timeout", "warning"),
    [
        (93.5, None),
        (
            93.0,
            "A proposal with its critique and score takes about 94 s, longer than "
            "REQUEST_TIMEOUT_SECONDS=93; set it to 130, or use smaller models.",
        ),
        (
            2.5,
            "A proposal with its critique and score takes about 94 s, longer than "
            "REQUEST_TIMEOUT_SECONDS=2.5; set it to 130, or use smaller models.",
        ),
    ],
)
def test_a_deadline_that_cannot_hold_the_sum_is_a_warning(
    timeout: float, warning: str | None
) -> None:
    assert Forecast(5.0, 86.0, 2.5).warning(timeout) == warning


# In `/health` and in the log


def fake_sidecar(
    phi3: Speed | None, hermes: Speed | None, critique_tokens: int = 256
) -> FakeSidecar:
    models = {"critique_max_tokens": critique_tokens}
    made = FakeSidecar(Settings(events={"url": "memory://"}, models=models))
    made.phi3.state, made.hermes.state = ModelStatus(speed=phi3), ModelStatus(speed=hermes)
    return made


def test_health_has_the_forecast_and_the_speeds() -> None:
    report = fake_sidecar(FAST, Speed(prefill=3000.0, decode=299.999)).sidecar.health.report()
    assert report["forecast"] == {
        "proposal_seconds": 5.0,
        "critique_seconds": 0.971,
        "score_seconds": 0.017,
        "timeout_seconds": 60.0,
        "warning": None,
    }
    assert report["models"]["phi3"]["speed"] == {"prefill": 128.0, "decode": 32.0}
    assert report["models"]["hermes"]["speed"] == {"prefill": 3000.0, "decode": 300.0}


def test_health_says_what_to_set_and_the_state_stays() -> None:
    fast, slow = fake_sidecar(FAST, FAST).sidecar.health, fake_sidecar(FAST, SLOW).sidecar.health
    assert slow.report()["forecast"]["warning"] == (
        "A proposal with its critique and score takes about 94 s, longer than "
        "REQUEST_TIMEOUT_SECONDS=60; set it to 130, or use smaller models."
    )
    assert (slow.status(), slow.missing()) == (fast.status(), fast.missing())


def test_the_critique_is_as_long_as_the_setting_allows() -> None:
    health = fake_sidecar(FAST, SLOW, critique_tokens=96).sidecar.health
    assert health.report()["forecast"]["critique_seconds"] == 46.0


def test_before_the_models_are_loaded_the_forecast_is_null() -> None:
    report = fake_sidecar(None, None).sidecar.health.report()
    assert report["forecast"] == {
        "proposal_seconds": None,
        "critique_seconds": None,
        "score_seconds": None,
        "timeout_seconds": 60.0,
        "warning": None,
    }
    assert report["models"]["phi3"]["speed"] is None


def test_the_log_has_the_forecast_once_both_models_are_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    fake_sidecar(FAST, None).sidecar.health.log_forecast()
    assert caplog.messages == []
    fake_sidecar(FAST, FAST).sidecar.health.log_forecast()
    fake_sidecar(FAST, SLOW).sidecar.health.log_forecast()
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [
        (logging.INFO, "forecast: a proposal 5.0 s, its critique 10.8 s, its score 0.3 s"),
        (logging.INFO, "forecast: a proposal 5.0 s, its critique 86.0 s, its score 2.5 s"),
        (
            logging.WARNING,
            "A proposal with its critique and score takes about 94 s, longer than "
            "REQUEST_TIMEOUT_SECONDS=60; set it to 130, or use smaller models.",
        ),
    ]

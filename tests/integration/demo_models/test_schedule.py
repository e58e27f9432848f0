"""The learning rates of both rounds."""

from __future__ import annotations

import pytest

from training.demo_models import recipe


def test_the_rate_rises_at_once_and_falls_to_its_least_which_the_second_round_begins_with() -> None:
    first, second = recipe._FIRST_ROUND, recipe._SECOND_ROUND
    assert first.rate(0.0) < 0.02
    rates = [first.rate(progress / 50) for progress in range(1, 51)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.99
    assert rates[-1] * first.matrix_rate == pytest.approx(second.matrix_rate)
    assert rates[-1] * first.other_rate == pytest.approx(second.other_rate)
    assert second.rate(1.0) == pytest.approx(0.02)

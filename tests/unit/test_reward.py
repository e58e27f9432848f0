"""The reward, against values worked out by hand."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from llm_sidecar.reward import proofable_reward

LONG: dict[str, Any] = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.0,
    "new_target_pct": 4.0,
    "confidence": 0.8,
    "rationale": "The trend is intact.",
}


NO_PROPOSAL = "the trace needs a proposal, an object"
NO_PRICES = "prices must be a list of positive numbers"
NO_PATCH = "patch_content must be the JSON text of a corrected proposal"


def squash(multiple: float) -> float:
    return (1 + math.tanh(multiple / 2)) / 2


def with_calibration(outcome: float, confidence: float) -> float:
    won = 1.0 if outcome > 0.5 else 0.0
    return (outcome + 1 - (confidence - won) ** 2) / 2


@pytest.mark.parametrize(
    ("changes", "prices", "multiple"),
    [
        ({}, [100, 101, 104.5, 90], 2.0),  # target first
        ({}, [100, 97.9, 110], -1.0),  # stop first
        ({}, [100, 101], 0.5),  # neither: marked to market
        ({"side": "SHORT"}, [100, 95], 2.0),
        ({"side": "SHORT"}, [100, 103], -1.0),
        ({"new_target_pct": None}, [100, 110], 5.0),
        ({"new_stop_pct": 0.5}, [100, 100.25], 0.5),
        # What is just reached counts as reached.
        ({"new_stop_pct": 50.0}, [100, 50, 104], -1.0),
        ({"new_stop_pct": 50.0, "new_target_pct": 100.0}, [100, 200, 100], 2.0),
        ({}, [100, 100], 0.0),
        ({"action": "pass"}, [100, 103], 1.5),
        ({"action": "abort"}, [100, 103], -1.5),
        ({"action": "abort", "side": "SHORT"}, [100, 103], 1.5),
    ],
)
def test_outcome_is_the_r_multiple_of_the_path(
    changes: dict[str, Any], prices: list[float], multiple: float
) -> None:
    reward = proofable_reward({"proposal": LONG | changes, "prices": prices})
    assert reward == pytest.approx(with_calibration(squash(multiple), 0.8))


def test_agreement_compares_field_by_field() -> None:
    patch = LONG | {"action": "pass", "new_stop_pct": 1.0, "rationale": "Other words."}
    # Equal: ticker, side, target, confidence; the action differs; the stop is half.
    assert proofable_reward({"proposal": LONG}, json.dumps(patch)) == pytest.approx(4.5 / 6)


def test_a_field_that_only_one_of_them_has_does_not_agree() -> None:
    without_side = {name: value for name, value in LONG.items() if name != "side"}
    without_target = {name: value for name, value in LONG.items() if name != "new_target_pct"}
    # Six fields in all, of which ticker, action, stop and confidence are equal.
    reward = proofable_reward({"proposal": without_side}, json.dumps(without_target))
    assert reward == pytest.approx(4 / 6)
    # What neither has is not compared.
    reward = proofable_reward({"proposal": without_side}, json.dumps(without_side))
    assert reward == pytest.approx(1.0)
    reward = proofable_reward({"proposal": without_side}, json.dumps(without_side | {"ticker": 1}))
    assert reward == pytest.approx(4 / 5)


@pytest.mark.parametrize("stop", [0.0, -2.0, None, "2", True])
def test_a_number_agrees_with_nothing_that_is_no_positive_number(stop: object) -> None:
    patch = LONG | {"new_stop_pct": stop}
    assert proofable_reward({"proposal": LONG}, json.dumps(patch)) == pytest.approx(5 / 6)


def test_a_number_beyond_every_float_agrees_with_nothing() -> None:
    patch = LONG | {"new_stop_pct": 10**400}
    assert proofable_reward({"proposal": LONG}, json.dumps(patch)) == pytest.approx(5 / 6)


def test_the_parts_are_averaged() -> None:
    trace = {"proposal": LONG, "prices": [100, 105]}
    outcome = squash(2.0)
    expected = (outcome + (1 - 0.2**2) + 1.0) / 3
    assert proofable_reward(trace, json.dumps(LONG)) == pytest.approx(expected)


def test_an_invalid_proposal_earns_nothing() -> None:
    trace = {"proposal": LONG | {"confidence": 3}, "prices": [100, 105]}
    assert proofable_reward(trace, json.dumps(LONG)) == 0.0


def test_without_evidence_there_is_no_reward() -> None:
    assert proofable_reward({"proposal": LONG}) == 0.0
    assert proofable_reward({"proposal": LONG, "prices": [100]}) == 0.0


def test_a_confident_loser_earns_less_than_a_doubtful_one() -> None:
    prices = [100, 97]
    sure, unsure = (
        proofable_reward({"proposal": LONG | {"confidence": c}, "prices": prices})
        for c in (0.95, 0.4)
    )
    assert sure < unsure


@pytest.mark.parametrize(
    ("trace", "patch", "message"),
    [
        ({"proposal": [1]}, None, NO_PROPOSAL),
        ({"proposal": LONG, "prices": "100"}, None, NO_PRICES),
        ({}, None, NO_PROPOSAL),
        (
            {"proposal": LONG, "prices": [100, float("nan")]},
            None,
            NO_PRICES,
        ),
        ({"proposal": LONG, "prices": [100, 0]}, None, NO_PRICES),
        (
            {"proposal": LONG, "prices": [True, 1]},
            None,
            NO_PRICES,
        ),
        (
            {"proposal": LONG, "prices": [1, 10**400]},
            None,
            NO_PRICES,
        ),
        (
            {"proposal": LONG},
            '{"a":' * 100_000,
            NO_PATCH,
        ),
        ({"proposal": LONG}, "{", NO_PATCH),
        ({"proposal": LONG}, "[]", NO_PATCH),
    ],
)
def test_bad_evidence_is_refused(trace: dict[str, Any], patch: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        proofable_reward(trace, patch)


def test_the_reward_is_bounded_whatever_the_numbers() -> None:
    rng = random.Random(7)
    for _ in range(500):
        proposal = LONG | {
            "action": rng.choice(["adjust", "pass", "abort"]),
            "side": rng.choice(["LONG", "SHORT"]),
            "new_stop_pct": rng.choice([None, 0.0, -3.0, 1e-300, rng.uniform(0, 1e9)]),
            "new_target_pct": rng.choice([None, 0.0, 1e300, rng.uniform(0, 100)]),
            "confidence": rng.random(),
        }
        prices = [10 ** rng.uniform(-9, 9) for _ in range(rng.randrange(6))]
        patch = json.dumps(proposal | {"new_stop_pct": rng.choice([None, -1.0, "x", 5])})
        reward = proofable_reward({"proposal": proposal, "prices": prices}, patch)
        assert 0.0 <= reward <= 1.0

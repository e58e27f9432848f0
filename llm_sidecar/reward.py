"""A reward for proposals, computed from facts only, for tuning.

Everything in it can be computed from the trace, without a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from llm_sidecar.proposals import Proposal

_UNIT_PCT: Final = 2.0
"""Percent of price change that counts as one R if a proposal sets no stop."""
_NUMBERS: Final = ("new_stop_pct", "new_target_pct", "confidence")


def proofable_reward(trace: dict[str, Any], patch_content: str | None = None) -> float:
    """How good a proposal was, as far as the trace proves it.

    A proposal that breaks the public schema gets 0. Otherwise the reward is the mean of the
    components for which the trace has evidence, each in [0, 1]. Without any evidence it is 0. The
    components:

    - outcome: with `prices`. An `adjust` with side and stop walks them until stop or target is
      hit, or marks to market at the end; its profit in units of the stop distance (the R multiple,
      Tharp 1998) maps to `(1 + tanh(R / 2)) / 2`. A `pass` or `abort` with a side compares the
      last price with the entry: the percent the side lost, divided by 2, is such an R for `abort`,
      and the percent it won one for `pass`.
    - calibration: with an outcome, `1 - (confidence - won)^2`, the complement of the score of
      Brier (1950), where `won` is 1 for an outcome above one half, else 0.
    - agreement: with `patch_content`, the mean over the fields of the corrected proposal, without
      the rationale: 1 for an equal value, for unequal numbers the smaller divided by the larger,
      else 0.

    Args:
        trace: `proposal` (object), and for an outcome `prices` (list of positive numbers, the
            entry first, in time order).
        patch_content: JSON text of the corrected proposal.

    Returns:
        The reward, in [0, 1].

    Raises:
        ValueError: the trace has no proposal, a price is not a positive number, or the patch is not
            a JSON object.
    """
    written = trace.get("proposal")
    if not isinstance(written, Mapping):
        raise ValueError("the trace needs a proposal, an object")
    prices = _prices(trace.get("prices", []))
    patch = None if patch_content is None else _patch(patch_content)
    try:
        proposal = Proposal.model_validate(dict(written))
    except ValidationError:
        return 0.0
    components = []
    outcome = _outcome(proposal, written.get("side"), prices)
    if outcome is not None:
        components += [outcome, 1.0 - (proposal.confidence - (outcome > 0.5)) ** 2]
    if patch is not None:
        components.append(_agreement(written, patch))
    return sum(components) / len(components) if components else 0.0


def _outcome(proposal: Proposal, side: str | None, prices: list[float]) -> float | None:
    if side is None or len(prices) < 2:
        return None
    sign = 1.0 if side == "LONG" else -1.0
    moves = [sign * 100.0 * (price / prices[0] - 1.0) for price in prices[1:]]
    if proposal.action == "adjust":
        if not proposal.new_stop_pct or proposal.new_stop_pct < 0:
            return None
        multiple = _exit(moves, proposal.new_stop_pct, proposal.new_target_pct)
        multiple /= proposal.new_stop_pct
    else:
        multiple = moves[-1] / _UNIT_PCT * (1.0 if proposal.action == "pass" else -1.0)
    return (1.0 + math.tanh(multiple / 2.0)) / 2.0


def _exit(moves: list[float], stop: float, target: float | None) -> float:
    """Percent won or lost where the stop or the target is first reached, else at the end."""
    for move in moves:
        if move <= -stop:
            return -stop
        if target is not None and move >= target:
            return target
    return moves[-1]


def _agreement(proposal: Mapping[str, Any], patch: Mapping[str, Any]) -> float:
    fields = [name for name in Proposal.model_fields if name != "rationale"]
    compared = [name for name in fields if name in proposal or name in patch]
    return sum(_similarity(name, proposal.get(name), patch.get(name)) for name in compared) / len(
        compared
    )


def _similarity(name: str, ours: object, theirs: object) -> float:
    if ours == theirs:
        return 1.0
    if name in _NUMBERS and _is_number(ours) and _is_number(theirs):
        low, high = sorted((float(str(ours)), float(str(theirs))))
        return low / high if low > 0.0 else 0.0
    return 0.0


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _prices(values: object) -> list[float]:
    if not isinstance(values, list) or not all(_is_number(v) and v > 0 for v in values):
        raise ValueError("prices must be a list of positive numbers")
    return [float(value) for value in values]


def _patch(content: str) -> dict[str, Any]:
    try:
        patch = json.loads(content)
    except (ValueError, RecursionError):
        patch = None
    if not isinstance(patch, dict):
        raise ValueError("patch_content must be the JSON text of a corrected proposal")
    return patch

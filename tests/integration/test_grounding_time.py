"""The time that grounding takes for the longest prompts, whatever is in them."""

from __future__ import annotations

import time
from typing import Final

import pytest

from llm_sidecar.grounding import numbers_in, tickers_in, ungrounded_fields
from tests.unit.test_grounding import MOST, proposal

LONGEST_PROMPT: Final = 32_768


@pytest.mark.parametrize(
    "piece",
    [
        "1 ", "9", "1,", ",200", "1.", "1.5 ", "1e", "1e9", ".", "A", "AAAAAAAAAAAA-", "^A ", "A-",
        "a=", "1k ", "e\u0301\u0323", "\u0301\u0323\u0327", "\u0663 ", "\ufdfa", "\u4fa1", "\u00bd",
        "1'234.5,", "1 200 ", "12:", " ",
    ],
)  # fmt: skip
def test_the_longest_context_takes_time_in_proportion_to_its_length(piece: str) -> None:
    context = (piece * LONGEST_PROMPT)[:LONGEST_PROMPT]
    rationale = (piece * 109)[:109]
    began = time.process_time()
    ungrounded_fields(proposal("A" * 12, rationale), context)
    numbers_in(context, MOST)
    tickers_in(context, MOST)
    # It takes some 0.1 s; it would take minutes if the time grew with the square of the length.
    assert time.process_time() - began < 20

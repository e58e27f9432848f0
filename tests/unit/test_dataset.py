"""Which corrections become training data, and what the chats and pairs contain."""

from __future__ import annotations

from typing import Any, Final

import pytest

from llm_sidecar import proposals
from llm_sidecar.db.export import LeftOut, Record
from llm_sidecar.tuning import dataset

PROPOSED: Final[dict[str, Any]] = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.5,
    "new_target_pct": 5.0,
    "confidence": 0.75,
    "rationale": "Volume is thin.",
}
CORRECTED: Final = PROPOSED | {"action": "pass", "new_stop_pct": None}
PROMPT: Final = [
    {"role": "system", "content": proposals.SYSTEM_PROMPT},
    {"role": "user", "content": "Long ABC"},
]
CHOSEN: Final = [
    {
        "role": "assistant",
        "content": '{"ticker":"ABC","action":"pass","side":"LONG","new_stop_pct":null,'
        '"new_target_pct":5.0,"confidence":0.75,"rationale":"Volume is thin."}',
    }
]
REJECTED: Final = [
    {
        "role": "assistant",
        "content": '{"ticker":"ABC","action":"adjust","side":"LONG","new_stop_pct":2.5,'
        '"new_target_pct":5.0,"confidence":0.75,"rationale":"Volume is thin."}',
    }
]


def record(**changes: Any) -> Record:
    values = {"prompt": "Long ABC", "proposal": PROPOSED, "corrected_proposal": CORRECTED}
    return values | changes


def row(transaction: str, correction: str | None) -> dict[str, Any]:
    return {"transaction_id": transaction, "corrected_proposal": correction}


def test_the_latest_correction_of_each_transaction_is_selected_in_their_order() -> None:
    rows = [
        row("a", "1"),
        row("b", "2"),
        row("a", "3"),
        row("b", None),
        row("c", ""),
        row("d", "4"),
    ]
    assert dataset.latest_corrections(rows) == [row("b", "2"), row("a", "3"), row("d", "4")]


def test_a_chat_has_the_correction_as_its_completion() -> None:
    assert dataset.chat(record()) == {"prompt": PROMPT, "completion": CHOSEN}
    assert dataset.chat(record(proposal=None)) == {"prompt": PROMPT, "completion": CHOSEN}


def test_a_pair_has_the_proposal_of_the_model_as_its_rejected_reply() -> None:
    assert dataset.pair(record()) == {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}


def test_keys_are_in_the_order_of_the_guidance_and_omitted_distances_are_null() -> None:
    short = {key: CORRECTED[key] for key in ("rationale", "confidence", "action", "ticker")}
    (reply,) = dataset.chat(record(corrected_proposal=short))["completion"]
    assert reply["content"] == (
        '{"ticker":"ABC","action":"pass","new_stop_pct":null,"new_target_pct":null,'
        '"confidence":0.75,"rationale":"Volume is thin."}'
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "of an unknown transaction"),
        ({"prompt": None, "corrected_proposal": None}, "of an unknown transaction"),
        ({"corrected_proposal": {"ticker": "ABC"}}, "no valid proposal"),
        ({"corrected_proposal": None}, "no valid proposal"),
    ],
)
@pytest.mark.parametrize("line", [dataset.chat, dataset.pair])
def test_a_record_without_a_prompt_or_a_valid_correction_is_left_out(
    line: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(LeftOut) as left_out:
        line(record(**changes))
    assert left_out.value.reason == reason


@pytest.mark.parametrize(
    "proposal", [None, CORRECTED, dict(reversed(CORRECTED.items())), {**CORRECTED}]
)
def test_a_pair_needs_another_proposal_to_reject(proposal: dict[str, Any] | None) -> None:
    with pytest.raises(LeftOut) as left_out:
        dataset.pair(record(proposal=proposal))
    assert left_out.value.reason == "without another proposal to reject"


def test_an_empty_prompt_and_an_empty_proposal_are_not_missing() -> None:
    assert dataset.chat(record(prompt=""))["prompt"][1]["content"] == ""
    (rejected,) = dataset.pair(record(proposal={}))["rejected"]
    assert rejected["content"] == '{"new_stop_pct":null,"new_target_pct":null}'


def test_the_summary_lists_reasons_in_the_order_of_the_checks() -> None:
    reasons = ("of an unknown transaction", "no valid proposal")
    assert (dataset.latest_corrections, dataset.chat, reasons) == dataset.CHATS
    assert (
        dataset.latest_corrections,
        dataset.pair,
        (*reasons, "without another proposal to reject"),
    ) == dataset.PAIRS

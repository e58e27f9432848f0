"""The proposal's schemas and its prompt: to the letter.

`tests/integration/test_proposals.py` shows that a decoder under guidance writes nothing else.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from llm_sidecar import proposals
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.base import GenerationRequest
from llm_sidecar.proposals import Example, Proposal
from tests.unit.fakes import fresh

VALID: dict[str, Any] = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 1.5,
    "new_target_pct": None,
    "confidence": 0.7,
    "rationale": "Größe zählt.",
}
WRITTEN = (
    '{"ticker":"ABC","action":"adjust","side":"LONG","new_stop_pct":1.5,"new_target_pct":null,'
    '"confidence":0.7,"rationale":"Gr\\u00f6\\u00dfe z\\u00e4hlt."}'
)
SYSTEM = {
    "role": "system",
    "content": (
        "You review open trades. Answer with one JSON object: ticker; action adjust, pass or "
        "abort; side LONG or SHORT if known; new_stop_pct and new_target_pct, the distance from "
        "the current price in percent, or null; confidence from 0 to 1; rationale, one short "
        "sentence."
    ),
}
OTHER = {"ticker": "XYZ", "action": "pass", "confidence": 1, "rationale": "It holds."}
EXAMPLES = [Example("first context", VALID), Example("second context", OTHER)]
SHOWN = [
    {"role": "user", "content": "first context"},
    {"role": "assistant", "content": WRITTEN},
    {"role": "user", "content": "second context"},
    {
        "role": "assistant",
        "content": '{"ticker":"XYZ","action":"pass","confidence":1,"rationale":"It holds."}',
    },
]
LEAST = 96
"""Tokens that a request must allow."""
MOST = 248
"""Tokens of the longest proposal."""


# The public schema


def test_the_public_schema_is_the_contracts() -> None:
    schema = Proposal.model_json_schema()
    assert list(schema["properties"]) == list(VALID)
    assert schema["required"] == ["ticker", "action", "confidence", "rationale"]
    assert schema["additionalProperties"] is False
    documentation = {"title", "description", "examples"}
    assert all(documentation <= set(field) for field in schema["properties"].values())
    assert {name: set(field) - documentation for name, field in schema["properties"].items()} == {
        "ticker": {"type", "minLength"},
        "action": {"type", "enum"},
        # It may be left out, and has no default: null is not a side.
        "side": {"type", "enum"},
        "new_stop_pct": {"anyOf", "default"},
        "new_target_pct": {"anyOf", "default"},
        "confidence": {"type", "minimum", "maximum"},
        "rationale": {"type", "minLength"},
    }
    assert schema["properties"]["action"]["enum"] == ["adjust", "pass", "abort"]
    assert schema["properties"]["side"]["enum"] == ["LONG", "SHORT"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"action": "pass"},
        {"action": "abort"},
        {"side": "SHORT"},
        {"new_stop_pct": 7},
        {"new_stop_pct": None},
        {"confidence": 0},
        {"confidence": 1},
        {"ticker": "B"},
        {"ticker": "BRK.B"},
        {"rationale": "R"},
    ],
)
def test_a_valid_proposal_is_accepted_as_written(changes: dict[str, Any]) -> None:
    written = VALID | changes
    assert proposals.is_valid(written) is True
    assert proposals.parse(json.dumps(written)) == written


@pytest.mark.parametrize("key", ["side", "new_stop_pct", "new_target_pct"])
def test_an_optional_key_that_is_left_out_stays_out(key: str) -> None:
    written = {name: value for name, value in VALID.items() if name != key}
    assert proposals.is_valid(written) is True
    assert proposals.parse(json.dumps(written)) == written


@pytest.mark.parametrize(
    "value",
    [
        *({k: v for k, v in VALID.items() if k != key} for key in ("ticker", "action")),
        *({k: v for k, v in VALID.items() if k != key} for key in ("confidence", "rationale")),
        VALID | {"extra": 1},
        VALID | {"action": "buy"},
        VALID | {"side": "BOTH"},
        VALID | {"side": None},
        VALID | {"confidence": 1.01},
        VALID | {"confidence": -0.01},
        VALID | {"confidence": "0.5"},
        VALID | {"confidence": True},
        VALID | {"new_stop_pct": "1"},
        VALID | {"new_target_pct": float("inf")},
        VALID | {"new_target_pct": float("nan")},
        VALID | {"ticker": ""},
        VALID | {"ticker": 7},
        VALID | {"rationale": ""},
        None,
        [],
        WRITTEN,
    ],
)
def test_anything_else_is_refused(value: object) -> None:
    assert proposals.is_valid(value) is False
    with pytest.raises(ValidationError):
        proposals.parse(json.dumps(value))


# Proposals of a model that may ignore its guidance


GUIDED: dict[str, Any] = VALID | {"rationale": "RSI at 78.5 calls for a tighter stop."}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"new_stop_pct": 0, "new_target_pct": 100},
        {"new_stop_pct": 2.0, "new_target_pct": 0.01},
        {"confidence": 1.0, "action": "abort", "side": "SHORT"},
        {"ticker": "ABCDEFGHIJKL"},
        {"rationale": f"A{'b' * 107}."},
    ],
)
def test_what_follows_the_guidance_is_accepted_however_it_is_spaced(
    changes: dict[str, Any],
) -> None:
    written = GUIDED | changes
    backwards = json.dumps(dict(reversed(written.items())), indent=2)
    assert proposals.parse_guided(backwards, proposals.GUIDANCE) == written


@pytest.mark.parametrize(
    "changes",
    [
        {"new_stop_pct": -5},
        {"new_stop_pct": 100.01},
        {"new_target_pct": -0.01},
        {"new_target_pct": 1e300},
        {"new_target_pct": 1.234},
        {"confidence": 0.725},
        {"ticker": "X" * 13},
        {"ticker": "X" * 4000},
        {"ticker": "abc"},
        {"rationale": f"A{'b' * 108}."},
        {"rationale": "A" * 5000},
        {"rationale": "Buy it now. Sell it later."},
        {"rationale": "Buy it now"},
        {"rationale": "Größe zählt hier."},
    ],
)
def test_what_does_not_follow_the_guidance_is_refused(changes: dict[str, Any]) -> None:
    written = GUIDED | changes
    assert proposals.is_valid(written)
    with pytest.raises(ValueError, match=r"^the proposal does not follow the guidance$"):
        proposals.parse_guided(json.dumps(written), proposals.GUIDANCE)


def test_what_is_no_proposal_does_not_follow_the_guidance_either() -> None:
    for text in ("", "{}", "Buy it.", json.dumps(GUIDED)[:-1], json.dumps(GUIDED | {"extra": 1})):
        with pytest.raises(ValidationError):
            proposals.parse_guided(text, proposals.GUIDANCE)


@pytest.mark.parametrize("key", ["new_stop_pct", "new_target_pct"])
def test_the_guidance_has_both_distances_written(key: str) -> None:
    written = {name: value for name, value in GUIDED.items() if name != key}
    with pytest.raises(ValueError, match="does not follow"):
        proposals.parse_guided(json.dumps(written), proposals.GUIDANCE)


def test_a_smaller_budget_and_a_context_bound_a_proposal_further() -> None:
    small, grounded = proposals.guidance(LEAST), proposals.grounded_guidance("ABC and quiet")
    assert grounded is not None
    with pytest.raises(ValueError, match="does not follow"):
        proposals.parse_guided(json.dumps(GUIDED), small)
    with pytest.raises(ValueError, match="does not follow"):
        proposals.parse_guided(json.dumps(GUIDED), grounded)
    written = GUIDED | {"rationale": "It holds for now."}
    for guidance in (small, grounded):
        assert proposals.parse_guided(json.dumps(written), guidance) == written


def test_a_proposal_is_frozen() -> None:
    proposal = Proposal.model_validate(VALID)
    with pytest.raises(ValidationError):
        proposal.ticker = "XYZ"  # type: ignore[misc]


# The guidance


def test_the_guidance_bounds_every_string_and_number() -> None:
    char, decimal = r"[A-Za-z0-9,;:%$()/+' -]", r"\.[0-9]"
    rationale = (
        rf"^[A-Z]({char}{{8,106}}"
        rf"|{char}{{0,36}}{decimal}{char}{{0,68}}"
        rf"|{char}{{0,68}}{decimal}{char}{{0,36}}"
        rf"|{char}{{0,34}}{decimal}{char}{{0,34}}{decimal}{char}{{0,34}})"
        r"[A-Za-z%)]\.$"
    )
    number = {"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 0.01}
    percent = {"anyOf": [number, {"type": "null"}]}
    assert json.loads(fresh(proposals).GUIDANCE) == {
        "x-guidance": {"whitespace_flexible": False},
        "type": "object",
        "properties": {
            "ticker": {"type": "string", "pattern": "^[A-Z0-9^][A-Z0-9./=_-]{0,11}$"},
            "action": {"enum": ["adjust", "pass", "abort"]},
            "side": {"enum": ["LONG", "SHORT"]},
            "new_stop_pct": percent,
            "new_target_pct": percent,
            "confidence": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
            "rationale": {"type": "string", "pattern": rationale},
        },
        "required": [
            *("ticker", "action", "new_stop_pct", "new_target_pct", "confidence", "rationale")
        ],
        "additionalProperties": False,
    }


def test_the_guidances_text_never_varies() -> None:
    assert fresh(proposals).GUIDANCE == proposals.GUIDANCE


def test_the_longest_proposal_takes_248_tokens() -> None:
    longest = VALID | {
        "ticker": "ABCDEFGHIJKL",
        "side": "SHORT",
        "new_stop_pct": 99.99,
        "new_target_pct": 99.99,
        "confidence": 0.99,
        "rationale": "A" * 109,
    }
    # 100.00 is a character longer than 99.99, twice; 1.00 as long as 0.99; and the turn ends.
    assert len(proposals.dumps(longest)) + 2 <= proposals.MAX_COMPLETION_TOKENS - 1
    most: int = proposals.MAX_COMPLETION_TOKENS
    assert most == MOST


@pytest.mark.parametrize(
    ("max_tokens", "bound"),
    [(96, 22), (98, 22), (99, 25), (128, 52), (182, 106), (183, 109), (248, 109), (8192, 109)],
)
def test_a_smaller_budget_shortens_the_rationale(max_tokens: int, bound: int) -> None:
    assert proposals.rationale_bound(max_tokens) == bound
    guidance = json.loads(proposals.guidance(max_tokens))
    expected = json.loads(proposals.GUIDANCE)
    char, decimal, part = r"[A-Za-z0-9,;:%$()/+' -]", r"\.[0-9]", (bound - 7) // 3
    expected["properties"]["rationale"]["pattern"] = (
        rf"^[A-Z]({char}{{8,{bound - 3}}}"
        rf"|{char}{{0,{part + 2}}}{decimal}{char}{{0,{2 * part}}}"
        rf"|{char}{{0,{2 * part}}}{decimal}{char}{{0,{part + 2}}}"
        rf"|{char}{{0,{part}}}{decimal}{char}{{0,{part}}}{decimal}{char}{{0,{part}}})"
        r"[A-Za-z%)]\.$"
    )
    assert guidance == expected
    # The same object: runtimes keep the compiled grammar by its text.
    assert proposals.guidance(max_tokens) is proposals.guidance(max_tokens)


def test_a_budget_below_96_tokens_is_refused() -> None:
    proposals.check_budget(LEAST)
    with pytest.raises(InvalidRequest) as caught:
        proposals.check_budget(LEAST - 1)
    assert caught.value.detail == "max_length: a proposal needs 96 tokens; send at least that"


# The prompt


def test_a_proposal_is_written_as_compact_json() -> None:
    assert proposals.dumps(VALID) == WRITTEN


def test_keys_are_put_into_the_order_of_the_guidance() -> None:
    disordered = dict(reversed(VALID.items()))
    assert list(proposals.in_order(disordered)) == list(VALID)
    assert proposals.in_order(disordered) == VALID
    assert list(proposals.in_order(dict(reversed(OTHER.items())))) == list(OTHER)


def test_the_prompt_is_the_system_prompt_the_examples_in_order_and_the_context() -> None:
    context = {"role": "user", "content": "now"}
    assert proposals.build_messages("now") == [SYSTEM, context]
    assert proposals.build_messages("now", EXAMPLES) == [SYSTEM, *SHOWN, context]


def test_what_every_prompt_begins_with_is_all_but_the_context() -> None:
    assert proposals.prefix(EXAMPLES, 0.3) == GenerationRequest(
        [SYSTEM, *SHOWN], MOST, proposals.GUIDANCE, 0.3, None
    )


# Grounding


CONTEXT = "Long ABC from 100, now 112.5; XYZ is quiet."


def test_a_contexts_guidance_offers_its_tickers_and_numbers() -> None:
    guidance = proposals.grounded_guidance(CONTEXT, ["quiet", "ABC"])
    assert guidance is not None
    text = "[A-Za-z,;:%$()/+' -]"
    body = rf"{text}*((100|112\.5){text}+)*(100|112\.5)?"
    expected = json.loads(proposals.GUIDANCE)
    expected["properties"]["ticker"] = {"enum": ["quiet", "ABC", "XYZ"]}
    expected["properties"]["rationale"] = {
        "type": "string",
        "pattern": rf"^[A-Z]{body}[A-Za-z%)]\.$",
        "minLength": 10,
        "maxLength": 109,
    }
    assert json.loads(guidance) == expected
    # The same text each time: runtimes keep the compiled grammar by it.
    assert proposals.grounded_guidance(CONTEXT, ["quiet", "ABC"]) == guidance


def test_a_contexts_guidance_has_the_bound_of_its_budget() -> None:
    wide, narrow = (proposals.grounded_guidance(CONTEXT, max_tokens=most) for most in (183, 96))
    assert wide is not None
    assert narrow is not None
    expected = json.loads(wide)
    assert expected["properties"]["rationale"]["maxLength"] == 109
    expected["properties"]["rationale"]["maxLength"] = 22
    assert json.loads(narrow) == expected


def test_a_guidance_says_whether_it_is_of_a_context() -> None:
    guidance = proposals.grounded_guidance(CONTEXT, max_tokens=96)
    assert guidance is not None
    assert proposals.is_grounded_guidance(guidance) is True
    assert proposals.is_grounded_guidance(proposals.guidance(96)) is False


def test_without_a_number_a_rationale_has_none() -> None:
    guidance = proposals.grounded_guidance("Long ABC.")
    assert guidance is not None
    properties = json.loads(guidance)["properties"]
    assert properties["ticker"] == {"enum": ["ABC"]}
    assert properties["rationale"]["pattern"] == "^[A-Z][A-Za-z,;:%$()/+' -]*[A-Za-z%)]\\.$"


def test_without_a_ticker_there_is_no_guidance() -> None:
    assert proposals.grounded_guidance("12,5 %") is None
    assert proposals.grounded_guidance("") is None


def test_at_most_64_tickers_and_numbers_are_offered() -> None:
    context = " ".join(f"T{n} at 1{n:03}" for n in range(100))
    guidance = proposals.grounded_guidance(context)
    assert guidance is not None
    properties = json.loads(guidance)["properties"]
    assert properties["ticker"]["enum"] == [f"T{n}" for n in range(64)]
    numbers = properties["rationale"]["pattern"].partition("((")[2].partition(")")[0].split("|")
    assert len(numbers) == 64

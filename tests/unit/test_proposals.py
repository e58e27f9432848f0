"""The proposal's schemas, its prompt, and how it is asked for: to the letter.

`tests/integration/test_proposals.py` shows that a decoder under guidance writes nothing else.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from llm_sidecar import proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, ModelUnavailable
from llm_sidecar.proposals import Example, Proposal
from tests.unit.fakes import FakeHost, completion, fresh

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
LEAST = 248
"""Tokens of the longest proposal."""


# The public schema


def test_the_public_schema_is_the_contracts() -> None:
    schema = Proposal.model_json_schema()
    assert list(schema["properties"]) == list(VALID)
    assert schema["required"] == ["ticker", "action", "confidence", "rationale"]
    assert schema["additionalProperties"] is False
    told = {"title", "description", "examples"}
    assert all(told <= set(field) for field in schema["properties"].values())
    assert {name: set(field) - told for name, field in schema["properties"].items()} == {
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
    least: int = proposals.MAX_COMPLETION_TOKENS
    assert least == LEAST


def test_a_budget_that_cannot_hold_it_is_refused() -> None:
    proposals.check_budget(LEAST)
    with pytest.raises(InvalidRequest) as caught:
        proposals.check_budget(LEAST - 1)
    assert caught.value.detail == ("max_length: a proposal can take 248 tokens; send at least that")


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
        [SYSTEM, *SHOWN], LEAST, proposals.GUIDANCE, 0.3, None
    )


# Asking


def request(
    examples: list[Example], max_tokens: int, temperature: float, prompt: str = "now"
) -> GenerationRequest:
    messages = proposals.build_messages(prompt, examples)
    return GenerationRequest(messages, max_tokens, proposals.GUIDANCE, temperature, None)


async def test_phi3_is_asked_under_guidance_with_the_examples() -> None:
    answer = completion(WRITTEN)
    fake = FakeHost(answer)
    deadline = Deadline.after(60)
    made = await proposals.propose(
        fake.host, "now", EXAMPLES, max_tokens=300, temperature=0.5, deadline=deadline
    )
    assert (made.proposal, made.completion) == (VALID, answer)
    assert fake.asked == [request(EXAMPLES, 300, 0.5)]
    assert (fake.deadlines, fake.partial) == ([deadline], [False])


async def test_unless_told_otherwise_it_is_greedy_and_takes_256_tokens() -> None:
    fake = FakeHost(completion(WRITTEN))
    await proposals.propose(fake.host, "now")
    assert fake.asked == [request([], 256, 0.0)]


async def test_too_small_a_budget_is_refused_before_the_model_is_asked() -> None:
    fake = FakeHost()
    with pytest.raises(InvalidRequest, match="max_length"):
        await proposals.propose(fake.host, "now", max_tokens=LEAST - 1)
    assert fake.asked == []


async def test_examples_that_do_not_fit_beside_a_prompt_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = completion(WRITTEN)
    fake = FakeHost(InvalidRequest("too long"), answer)
    deadline = Deadline.after(60)
    made = await proposals.propose(
        fake.host, "now", EXAMPLES, max_tokens=300, temperature=0.5, deadline=deadline
    )
    assert (made.proposal, made.completion) == (VALID, answer)
    assert fake.asked == [request(EXAMPLES, 300, 0.5), request([], 300, 0.5)]
    assert fake.deadlines == [deadline, deadline]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the few-shot examples do not fit the context beside a long prompt")
    ]


async def test_a_prompt_that_does_not_fit_alone_is_refused() -> None:
    fake = FakeHost(InvalidRequest("too long"), InvalidRequest("still too long"))
    with pytest.raises(InvalidRequest, match=r"^too long$"):
        await proposals.propose(fake.host, "now")
    fake = FakeHost(InvalidRequest("too long"), InvalidRequest("still too long"))
    with pytest.raises(InvalidRequest, match=r"^still too long$"):
        await proposals.propose(fake.host, "now", EXAMPLES)
    assert len(fake.asked) == 2


async def test_another_error_is_not_tried_again_without_the_examples() -> None:
    fake = FakeHost(DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded, match=r"^late$"):
        await proposals.propose(fake.host, "now", EXAMPLES)
    assert len(fake.asked) == 1


@pytest.mark.parametrize("text", [WRITTEN[:-1], "Buy it.", "", WRITTEN.replace("adjust", "buy")])
async def test_what_is_no_valid_proposal_never_comes_back(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeHost(completion(text))
    with pytest.raises(ModelUnavailable) as caught:
        await proposals.propose(fake.host, "now")
    assert caught.value.detail == (
        "phi3 wrote something that is no valid proposal, so nothing is returned; "
        "check the model with another prompt."
    )
    assert caught.value.retry_after == 1
    # Neither the error's cause nor the log quotes what it wrote.
    assert caught.value.__suppress_context__
    assert caplog.messages == ["phi3 broke the proposal schema under guidance: ValidationError"]


# Grounding


CONTEXT = "Long ABC from 100, now 112.5; XYZ is quiet."
GROUNDED = VALID | {"rationale": "ABC is at 112.5."}
MADE_UP = VALID | {"ticker": "NEW", "rationale": "RSI is at 78."}


async def test_what_is_not_grounded_is_named() -> None:
    fake = FakeHost(completion(json.dumps(GROUNDED)), completion(json.dumps(MADE_UP)))
    made = await proposals.propose(fake.host, CONTEXT)
    assert (made.ungrounded, made.grounded) == ((), "true")
    made = await proposals.propose(fake.host, CONTEXT)
    assert (made.ungrounded, made.grounded) == (("ticker", "rationale"), "ticker,rationale")
    assert len(fake.asked) == 2


def retried(tickers: list[str]) -> GenerationRequest:
    first = request(EXAMPLES, 300, 0.5, CONTEXT)
    guidance = proposals.grounded_guidance(CONTEXT, tickers)
    return replace(first, guidance=guidance, seed=0)


async def propose_again(fake: FakeHost, deadline: Deadline | None = None) -> proposals.Proposed:
    return await proposals.propose(
        fake.host,
        CONTEXT,
        EXAMPLES,
        max_tokens=300,
        temperature=0.5,
        deadline=deadline,
        retry=True,
    )


async def test_an_ungrounded_proposal_is_retried_under_the_guidance_of_its_context() -> None:
    better = completion(json.dumps(GROUNDED))
    fake = FakeHost(completion(json.dumps(MADE_UP)), better)
    made = await propose_again(fake)
    assert (made.proposal, made.completion, made.grounded) == (GROUNDED, better, "true")
    # The ticker is none of the context's, so it is no choice.
    assert fake.asked == [request(EXAMPLES, 300, 0.5, CONTEXT), retried([])]
    assert fake.deadlines == [None, None]


async def test_a_ticker_that_the_context_has_stays_a_choice() -> None:
    written = VALID | {"ticker": "quiet", "rationale": "RSI is at 78."}
    fake = FakeHost(completion(json.dumps(written)), completion(json.dumps(MADE_UP)))
    made = await propose_again(fake)
    assert fake.asked[1] == retried(["quiet"])
    # It is asked for once more, and then reported.
    assert made.ungrounded == ("ticker", "rationale")
    assert len(fake.asked) == 2


async def test_what_is_grounded_is_not_asked_for_again() -> None:
    fake = FakeHost(completion(json.dumps(GROUNDED)))
    assert (await propose_again(fake)).grounded == "true"
    assert len(fake.asked) == 1


async def test_a_context_without_a_ticker_has_no_guidance_to_ask_with() -> None:
    fake = FakeHost(completion(json.dumps(MADE_UP)))
    made = await proposals.propose(fake.host, "12,5 %", retry=True)
    assert made.proposal == MADE_UP
    assert len(fake.asked) == 1


async def test_a_retry_has_half_of_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    fake = FakeHost(completion(json.dumps(MADE_UP)), completion(json.dumps(GROUNDED)))
    deadline = Deadline(now - 20.0, 60.0)
    await propose_again(fake, deadline)
    assert fake.deadlines == [deadline, Deadline(now, 20.0)]


@pytest.mark.parametrize("failure", [DeadlineExceeded("late"), InvalidRequest("too long"), "{"])
async def test_a_retry_that_fails_leaves_the_first_proposal(
    failure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    second = completion(failure) if isinstance(failure, str) else failure
    kind = "ModelUnavailable" if isinstance(failure, str) else type(failure).__name__
    fake = FakeHost(completion(json.dumps(MADE_UP)), second)
    made = await propose_again(fake)
    assert (made.proposal, made.grounded) == (MADE_UP, "ticker,rationale")
    assert caplog.messages[-1] == f"the retry of an ungrounded proposal failed: {kind}"


async def test_a_retry_beside_a_long_prompt_has_no_examples_either() -> None:
    fake = FakeHost(
        InvalidRequest("too long"),
        completion(json.dumps(MADE_UP)),
        completion(json.dumps(GROUNDED)),
    )
    assert (await propose_again(fake)).proposal == GROUNDED
    messages = proposals.build_messages(CONTEXT)
    again = fake.asked[2]
    assert isinstance(again, GenerationRequest)
    assert again.messages == messages


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

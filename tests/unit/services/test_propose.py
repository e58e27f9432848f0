"""A proposal: the request to Phi-3, the retry, and the stream."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from llm_sidecar import proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, ModelUnavailable, QueueFull
from llm_sidecar.models.base import Delta, GenerationRequest, RefusedRequest
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.proposals import Example, Proposed
from llm_sidecar.services.propose import Proposer
from llm_sidecar.telemetry.metrics import MetricsSink
from tests.unit.fakes import PausedModel, completion, last_of
from tests.unit.services.samples import PROMPT, PROPOSAL, SEED, UNGROUNDED, fake_sidecar
from tests.unit.services.samples import WRITTEN as WRITTEN_OF_ABC

VALID: dict[str, Any] = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 1.5,
    "new_target_pct": None,
    "confidence": 0.7,
    "rationale": "Größe zählt.",
}
WRITTEN = proposals.dumps(VALID)
OTHER = {"ticker": "XYZ", "action": "pass", "confidence": 1, "rationale": "It holds."}
EXAMPLES = [Example("first context", VALID), Example("second context", OTHER)]
LEAST = proposals.MIN_COMPLETION_TOKENS


def proposer(
    fake: FakeModel,
    examples: Sequence[Example] = (),
    temperature: float = 0.0,
    retry: bool = False,
) -> Proposer:
    return Proposer(fake, lambda: examples, MetricsSink(), temperature=temperature, retry=retry)


async def propose(
    fake: FakeModel,
    prompt: str,
    examples: Sequence[Example] = (),
    max_tokens: int = 256,
    deadline: Deadline | None = None,
    **options: Any,
) -> Proposed:
    asking = proposer(fake, examples, **options)
    return await last_of(
        asking.generate(prompt, max_tokens, deadline or Deadline.after(60.0)), Proposed
    )


async def test_a_proposal_alone_is_neither_stored_nor_published() -> None:
    made = fake_sidecar()
    deadline = Deadline.after(60.0)
    generating = made.sidecar.proposer.generate(PROMPT, 300, deadline)
    made_now = await last_of(generating, Proposed)
    assert made_now[:3] == (PROPOSAL, WRITTEN_OF_ABC, ())
    assert (made_now.request, made_now.examples) == (made.phi3.requests[0], ())
    assert made.happened.log == [("metric", "proposed", ("adjust",))]
    messages = proposals.build_messages(PROMPT)
    assert made.phi3.requests == [GenerationRequest(messages, 300, proposals.GUIDANCE, 0.0)]
    (call,) = made.phi3.calls
    assert call.deadline == deadline


async def test_a_proposal_alone_is_retried_where_it_is_not_grounded() -> None:
    made = fake_sidecar(proposals={"grounding": "retry"})
    made.phi3.answers = [UNGROUNDED, WRITTEN_OF_ABC]
    proposed = await last_of(
        made.sidecar.proposer.generate(PROMPT, 300, Deadline.after(60.0)), Proposed
    )
    assert proposed.proposal == PROPOSAL
    assert made.happened.log == [("metric", "proposed", ("adjust",))]


# Asking


def request(
    examples: list[Example], max_tokens: int, temperature: float, prompt: str = "now"
) -> GenerationRequest:
    messages = proposals.build_messages(prompt, examples)
    seed = SEED if temperature else None
    guidance = proposals.guidance(max_tokens)
    return GenerationRequest(messages, max_tokens, guidance, temperature, seed)


async def test_phi3_is_asked_under_guidance_with_the_examples() -> None:
    answer = completion(WRITTEN)
    fake = FakeModel(answer)
    deadline = Deadline.after(60)
    made = await propose(fake, "now", EXAMPLES, max_tokens=300, temperature=0.5, deadline=deadline)
    assert (made.proposal, made.completion) == (VALID, answer)
    assert fake.requests == [request(EXAMPLES, 300, 0.5)]
    (call,) = fake.calls
    assert (call.deadline, call.allow_partial) == (deadline, False)


async def test_too_small_a_budget_is_refused_before_the_model_is_asked() -> None:
    fake = FakeModel()
    with pytest.raises(InvalidRequest, match="max_length"):
        await propose(fake, "now", max_tokens=LEAST - 1)
    assert fake.requests == []


async def test_a_small_budget_bounds_the_rationale_also_in_a_retry() -> None:
    fake = FakeModel(completion(json.dumps(MADE_UP)), completion(json.dumps(GROUNDED)))
    await propose(fake, CONTEXT, retry=True, max_tokens=LEAST)
    first, second = fake.requests
    assert isinstance(first, GenerationRequest)
    assert isinstance(second, GenerationRequest)
    assert first.guidance == proposals.guidance(LEAST) != proposals.GUIDANCE
    assert second.guidance == proposals.grounded_guidance(CONTEXT, (), LEAST)


async def test_a_budget_that_is_too_small_for_the_tokenizer_is_refused_and_not_retried() -> None:
    cut = replace(completion(WRITTEN[:96]), finish_reason="length")
    fake = FakeModel(cut)
    with pytest.raises(InvalidRequest) as caught:
        await propose(fake, "now", EXAMPLES, max_tokens=LEAST)
    assert caught.value.detail == (
        "max_length: this model's tokenizer needs more than 96 tokens for a proposal; send 248"
    )
    assert fake.requests == [request(EXAMPLES, LEAST, 0.0)]


async def test_a_small_budget_is_not_to_blame_if_the_model_may_ignore_its_guidance() -> None:
    cut, better = completion(" " * 96, finish_reason="length"), completion(WRITTEN_OF_ABC.text)
    fake = FakeModel(cut, better, cut, cut)
    fake.valid_by_construction = False
    assert (await propose(fake, "now", max_tokens=LEAST)).completion == better
    with pytest.raises(ModelUnavailable, match="did not write a valid proposal"):
        await propose(fake, "now", max_tokens=LEAST)
    assert len(fake.requests) == 4


async def test_a_cut_proposal_within_a_sufficient_budget_is_the_models_failure() -> None:
    fake = FakeModel(*[replace(completion(WRITTEN[:96]), finish_reason="length")] * 2)
    with pytest.raises(ModelUnavailable, match="did not write a valid proposal"):
        await propose(fake, "now", max_tokens=proposals.MAX_COMPLETION_TOKENS)


async def test_examples_that_do_not_fit_beside_a_prompt_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = completion(WRITTEN)
    fake = FakeModel(InvalidRequest("too long"), answer)
    deadline = Deadline.after(60)
    made = await propose(fake, "now", EXAMPLES, max_tokens=300, temperature=0.5, deadline=deadline)
    assert (made.proposal, made.completion) == (VALID, answer)
    assert fake.requests == [request(EXAMPLES, 300, 0.5), request([], 300, 0.5)]
    assert [call.deadline for call in fake.calls] == [deadline, deadline]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the few-shot examples do not fit the context beside a long prompt")
    ]


async def test_a_prompt_that_does_not_fit_alone_is_refused() -> None:
    fake = FakeModel(InvalidRequest("too long"), InvalidRequest("still too long"))
    with pytest.raises(InvalidRequest, match=r"^too long$"):
        await propose(fake, "now")
    fake = FakeModel(InvalidRequest("too long"), InvalidRequest("still too long"))
    with pytest.raises(InvalidRequest, match=r"^still too long$"):
        await propose(fake, "now", EXAMPLES)
    assert len(fake.requests) == 2


async def test_another_error_is_not_tried_again_without_the_examples() -> None:
    fake = FakeModel(DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded, match=r"^late$"):
        await propose(fake, "now", EXAMPLES)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("text", [WRITTEN[:-1], "Buy it.", "", WRITTEN.replace("adjust", "buy")])
async def test_what_is_no_valid_proposal_never_comes_back(
    text: str, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeModel(*[completion(text)] * 2)
    fake.valid_by_construction = requests == 1
    with pytest.raises(ModelUnavailable) as caught:
        await propose(fake, "now")
    assert len(fake.requests) == requests
    assert caught.value.detail == (
        "phi3 did not write a valid proposal, so nothing is returned; "
        "check the model with another prompt."
    )
    assert caught.value.retry_after == 1
    # Neither the error's cause nor the log quotes what it wrote.
    assert caught.value.__suppress_context__
    said = "phi3 broke the proposal schema under guidance: ValidationError"
    assert caplog.messages == [said] * requests


@pytest.mark.parametrize(("temperature", "second"), [(0.0, 0.7), (0.5, 0.7), (0.9, 0.9)])
async def test_an_invalid_proposal_is_asked_for_once_more_with_sampling(
    temperature: float, second: float
) -> None:
    better = completion(WRITTEN_OF_ABC.text)
    fake = FakeModel(completion("Buy it."), better)
    fake.valid_by_construction = False
    deadline = Deadline.after(60)
    made = await propose(fake, "now", temperature=temperature, deadline=deadline)
    assert (made.proposal, made.completion) == (PROPOSAL, better)
    first = request([], 256, temperature)
    again = replace(first, temperature=second, seed=SEED + 1 if temperature else SEED)
    assert fake.requests == [first, again]
    assert made.request == again
    assert [call.deadline for call in fake.calls] == [deadline, deadline]


@pytest.mark.parametrize(
    "changes",
    [
        {"new_stop_pct": -5},
        {"new_target_pct": 1e300},
        {"ticker": "X" * 4000},
        {"rationale": "A" * 5000},
        {"rationale": "Buy it now. Sell it later."},
    ],
)
async def test_a_proposal_of_a_model_that_may_ignore_its_guidance_is_checked_against_it(
    changes: dict[str, Any],
) -> None:
    wrong, better = PROPOSAL | changes, completion(WRITTEN_OF_ABC.text)
    fake = FakeModel(completion(json.dumps(wrong)), better, completion(json.dumps(wrong)))
    fake.valid_by_construction = False
    assert (await propose(fake, "now")).completion == better
    fake.valid_by_construction = True
    assert (await propose(fake, "now")).proposal == wrong


async def test_the_retry_of_such_a_model_is_checked_against_the_guidance_of_its_context() -> None:
    first = completion(json.dumps(PROPOSAL | {"ticker": "NEW"}))
    good = completion(WRITTEN_OF_ABC.text)
    bad = completion(json.dumps(PROPOSAL | {"rationale": "It was at 4711 once."}))
    fake = FakeModel(first, bad, first, good)
    fake.valid_by_construction = False
    assert (await propose(fake, PROMPT, retry=True)).completion == first
    assert (await propose(fake, PROMPT, retry=True)).completion == good


async def test_the_second_request_samples_as_the_client_asked() -> None:
    fake = FakeModel(completion("Buy it."), completion(WRITTEN_OF_ABC.text))
    fake.valid_by_construction = False
    messages = [{"role": "user", "content": "now"}]
    generating = proposer(fake).answer(
        messages, 256, Deadline.after(60.0), temperature=0.9, top_p=0.8, seed=7
    )
    await last_of(generating, Proposed)
    first, second = fake.requests
    assert isinstance(first, GenerationRequest)
    assert (first.temperature, first.top_p, first.seed) == (0.9, 0.8, 7)
    assert second == replace(first, seed=8)


# Grounding


CONTEXT = "Long ABC from 100, now 112.5; XYZ is quiet."
GROUNDED = VALID | {"rationale": "ABC is at 112.5."}
MADE_UP = VALID | {"ticker": "NEW", "rationale": "RSI is at 78."}


async def test_what_is_not_grounded_is_named() -> None:
    fake = FakeModel(completion(json.dumps(GROUNDED)), completion(json.dumps(MADE_UP)))
    made = await propose(fake, CONTEXT)
    assert (made.ungrounded, made.grounded) == ((), "true")
    made = await propose(fake, CONTEXT)
    assert (made.ungrounded, made.grounded) == (("ticker", "rationale"), "ticker,rationale")
    assert len(fake.requests) == 2


async def test_the_context_is_all_turns_of_the_user() -> None:
    fake = FakeModel(completion(json.dumps(GROUNDED)))
    turns = [{"role": "user", "content": text} for text in ("Long ABC", "112.5 now")]
    made = await last_of(proposer(fake).answer(turns, 256, Deadline.after(60.0)), Proposed)
    assert made.ungrounded == ()


async def test_a_chat_with_a_system_turn_of_its_own_gets_no_examples() -> None:
    fake = FakeModel(completion(json.dumps(GROUNDED)))
    examples = [Example(CONTEXT, GROUNDED, feedback_id="f-1")]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CONTEXT}]
    answering = proposer(fake, examples).answer(turns, 256, Deadline.after(60.0))
    assert (await last_of(answering, Proposed)).examples == ()
    (asked,) = fake.requests
    assert isinstance(asked, GenerationRequest)
    assert asked.messages == turns


def retried(tickers: list[str]) -> GenerationRequest:
    first = request(EXAMPLES, 300, 0.5, CONTEXT)
    guidance = proposals.grounded_guidance(CONTEXT, tickers)
    return replace(first, guidance=guidance)


async def propose_again(fake: FakeModel, deadline: Deadline | None = None) -> Proposed:
    return await propose(
        fake,
        CONTEXT,
        EXAMPLES,
        max_tokens=300,
        temperature=0.5,
        deadline=deadline,
        retry=True,
    )


async def test_an_ungrounded_proposal_is_retried_under_the_guidance_of_its_context() -> None:
    better = completion(json.dumps(GROUNDED))
    fake = FakeModel(completion(json.dumps(MADE_UP)), better)
    made = await propose_again(fake)
    assert (made.proposal, made.completion, made.grounded) == (GROUNDED, better, "true")
    # The ticker is not in the context, so the guidance excludes it.
    assert fake.requests == [request(EXAMPLES, 300, 0.5, CONTEXT), retried([])]


async def test_a_ticker_that_the_context_has_stays_a_choice() -> None:
    written = VALID | {"ticker": "quiet", "rationale": "RSI is at 78."}
    fake = FakeModel(completion(json.dumps(written)), completion(json.dumps(MADE_UP)))
    made = await propose_again(fake)
    assert fake.requests[1] == retried(["quiet"])
    # It is asked for once more, and then reported.
    assert made.ungrounded == ("ticker", "rationale")
    assert len(fake.requests) == 2


async def test_what_is_grounded_is_not_asked_for_again() -> None:
    fake = FakeModel(completion(json.dumps(GROUNDED)))
    assert (await propose_again(fake)).grounded == "true"
    assert len(fake.requests) == 1


async def test_a_context_without_a_ticker_has_no_guidance_to_ask_with() -> None:
    fake = FakeModel(completion(json.dumps(MADE_UP)))
    made = await propose(fake, "12,5 %", retry=True)
    assert made.proposal == MADE_UP
    assert len(fake.requests) == 1


async def test_a_retry_has_half_of_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    fake = FakeModel(completion(json.dumps(MADE_UP)), completion(json.dumps(GROUNDED)))
    deadline = Deadline(now - 20.0, 60.0)
    await propose_again(fake, deadline)
    assert [call.deadline for call in fake.calls] == [deadline, Deadline(now, 20.0)]


@pytest.mark.parametrize(
    "failure",
    [
        DeadlineExceeded("late"),
        InvalidRequest("too long"),
        ModelUnavailable("gone"),
        QueueFull("full"),
        "{",
        '{"not": "a proposal"}',
    ],
)
async def test_a_retry_that_fails_leaves_the_first_proposal(
    failure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    second = completion(failure) if isinstance(failure, str) else failure
    kind = "InvalidProposal" if isinstance(failure, str) else type(failure).__name__
    fake = FakeModel(completion(json.dumps(MADE_UP)), second)
    made = await propose_again(fake)
    assert (made.proposal, made.grounded) == (MADE_UP, "ticker,rationale")
    assert made.completion == completion(json.dumps(MADE_UP))
    assert len(fake.requests) == 2
    assert caplog.messages[-1] == f"the retry of an ungrounded proposal failed: {kind}"


async def test_a_retry_beside_a_long_prompt_has_no_examples_either() -> None:
    fake = FakeModel(
        InvalidRequest("too long"),
        completion(json.dumps(MADE_UP)),
        completion(json.dumps(GROUNDED)),
    )
    assert (await propose_again(fake)).proposal == GROUNDED
    messages = proposals.build_messages(CONTEXT)
    again = fake.requests[2]
    assert isinstance(again, GenerationRequest)
    assert again.messages == messages


async def test_a_grounded_ticker_stays_a_choice_however_many_the_context_has() -> None:
    context = " ".join(f"AB{number}" for number in range(1000))
    again = VALID | {"ticker": "AB999"}
    first = again | {"rationale": "RSI is at 4711."}
    fake = FakeModel(completion(json.dumps(first)), completion(json.dumps(again)))
    assert (await propose(fake, context, retry=True)).grounded == "true"
    request = fake.requests[1]
    assert isinstance(request, GenerationRequest)
    assert request.guidance == proposals.grounded_guidance(context, ["AB999"])


async def test_a_proposal_that_a_server_refuses_is_not_the_fault_of_the_client() -> None:
    fake = FakeModel(RefusedRequest("The phi3 server a refuses this request (400)."))
    with pytest.raises(ModelUnavailable, match="refuses this request") as caught:
        await propose(fake, PROMPT, EXAMPLES)
    assert caught.value.retry_after == 5
    # The examples are not the reason either.
    assert len(fake.requests) == 1


# Streaming


async def test_deltas_arrive_while_phi3_generates_and_the_proposal_last() -> None:
    half = len(WRITTEN) // 2
    phi3 = PausedModel(WRITTEN[:half], WRITTEN[half:])
    generating = proposer(phi3).generate("now", 256, Deadline.after(60.0))
    assert await anext(generating) == Delta(WRITTEN[:half], "paused/fake")
    assert phi3.closed == 0
    phi3.resumed.set()
    rest = [item async for item in generating]
    assert [type(item) for item in rest] == [Delta, Proposed]
    assert isinstance(rest[1], Proposed)
    assert (rest[1].proposal, rest[1].completion.text) == (VALID, WRITTEN)


async def test_the_deltas_of_a_retry_stream_too() -> None:
    fake = FakeModel(completion(json.dumps(MADE_UP)), completion(json.dumps(GROUNDED)))
    items = [
        item
        async for item in proposer(fake, retry=True).generate(CONTEXT, 256, Deadline.after(60.0))
    ]
    assert [type(item) for item in items] == [Delta] * 4 + [Proposed]
    texts = [item.text for item in items if isinstance(item, Delta)]
    assert ["".join(texts[:2]), "".join(texts[2:])] == [json.dumps(MADE_UP), json.dumps(GROUNDED)]


async def test_closing_the_stream_closes_the_models() -> None:
    phi3 = PausedModel()
    generating = proposer(phi3).generate("now", 256, Deadline.after(60.0))
    await anext(generating)
    await generating.aclose()
    assert phi3.closed == 1

"""Chats of clients: the requests to the models, and the parts of the answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, NotFound, QueueFull
from llm_sidecar.models.base import (
    Adapter,
    Completion,
    Delta,
    GenerationRequest,
    Message,
    ModelStatus,
    TokenLogprob,
)
from llm_sidecar.services.answers import Reason
from llm_sidecar.services.client_schemas import guidance_of
from llm_sidecar.services.conversation import (
    MAX_TOKENS,
    Conversation,
    Finished,
    Part,
    TextPart,
    TextPrompt,
    Tool,
    ToolCallPart,
)
from llm_sidecar.services.tools import answer_schema, instructions
from tests.unit.fakes import FakeSidecar, PausedModel, completion
from tests.unit.services.samples import PROMPT, SEED, UNGROUNDED, WRITTEN, fake_sidecar

CHAT: list[Message] = [{"role": "user", "content": PROMPT}]
TEXT = completion("Hold it.", model="hermes/fake")
TOOLS = (Tool("close"),)
TOKEN = TokenLogprob(1, b"Hold", -0.5)


@pytest.fixture
def made() -> FakeSidecar:
    return fake_sidecar(models={"hermes_temperature": 0.3})


def end(
    completion: Completion, grounded: str | None = None, *, reason: Reason = "stop"
) -> Finished:
    """The end of an answer, whose text is in the parts before."""
    return Finished(reason, replace(completion, text="", logprobs=()), grounded)


async def answered(
    made: FakeSidecar, model: str, conversation: Conversation, deadline: Deadline | None = None
) -> list[Part]:
    parts = made.sidecar.conversations.answer(model, conversation, deadline)
    return [part async for part in parts]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


# Free text


async def test_hermes_answers_a_chat_with_the_settings_of_the_server(made: FakeSidecar) -> None:
    made.hermes.answers = [TEXT]
    deadline = Deadline.after(7)
    parts = await answered(made, "hermes", Conversation(CHAT), deadline)
    assert parts == [TextPart("Hold"), TextPart(" it."), end(TEXT)]
    assert made.hermes.requests == [
        GenerationRequest(CHAT, MAX_TOKENS, temperature=0.3, fit_context=True)
    ]
    (call,) = made.hermes.calls
    assert (call.deadline, call.allow_partial) == (deadline, True)
    assert made.happened.log == []


async def test_a_chat_may_set_everything_itself(made: FakeSidecar) -> None:
    made.hermes.answers = [TEXT]
    schema = {"type": "array"}
    conversation = Conversation(CHAT, 5, 0.0, 0.9, 7, (), schema, logprobs=3)
    await answered(made, "hermes", conversation)
    assert made.hermes.requests == [
        GenerationRequest(
            CHAT, 5, guidance_of(schema), 0.0, 7, top_p=0.9, logprobs=3, check_answer=True
        )
    ]


async def test_without_a_deadline_it_has_that_of_all_requests() -> None:
    made = fake_sidecar(limits={"request_timeout": 9})
    made.hermes.answers = [TEXT]
    await answered(made, "hermes", Conversation(CHAT))
    (call,) = made.hermes.calls
    assert call.deadline is not None
    assert call.deadline.seconds == 9


async def test_an_answer_that_a_limit_or_the_deadline_cut_has_the_reason_length(
    made: FakeSidecar,
) -> None:
    for reason in ("length", "deadline"):
        cut = completion("Hold", finish_reason=reason)
        made.hermes.answers = [cut]
        parts = await answered(made, "hermes", Conversation(CHAT))
        assert parts[-1] == end(cut, reason="length")


async def test_a_stop_text_ends_the_generation(made: FakeSidecar) -> None:
    paused = PausedModel("one END", " two")
    made = FakeSidecar(hermes=paused)
    parts = await answered(made, "hermes", Conversation(CHAT, stop=("END",)))
    assert paused.closed == 1
    assert parts[0] == TextPart("one ")
    (_, finished) = parts
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.completion.finish_reason) == ("stop", "stop")
    assert finished.at_stop_text


async def test_log_probabilities_come_with_their_text(made: FakeSidecar) -> None:
    made.hermes.answers = [
        [
            Delta("Hold", "hermes/fake", logprobs=(TOKEN,)),
            Delta("", "hermes/fake", completion_tokens=1, finish_reason="stop"),
        ]
    ]
    parts = await answered(made, "hermes", Conversation(CHAT, logprobs=0))
    assert parts == [
        TextPart("Hold", (TOKEN,)),
        end(Completion("", "hermes/fake", None, "stop", 0, 1)),
    ]


async def test_errors_of_the_model_are_raised(made: FakeSidecar) -> None:
    made.hermes.answers = [QueueFull("Full.")]
    with pytest.raises(QueueFull):
        await answered(made, "hermes", Conversation(CHAT))
    made.hermes.answers = [[Delta("Hold", "hermes/fake")]]
    with pytest.raises(ModelUnavailable):
        await answered(made, "hermes", Conversation(CHAT))


async def test_closing_an_answer_ends_the_generation() -> None:
    paused = PausedModel()
    made = FakeSidecar(hermes=paused)
    parts = made.sidecar.conversations.answer("hermes", Conversation(CHAT))
    assert await anext(parts) == TextPart("{")
    await parts.aclose()
    assert paused.closed == 1


# Names


async def test_an_unknown_model_is_not_found(made: FakeSidecar) -> None:
    with pytest.raises(NotFound):
        await answered(made, "gpt-4", Conversation(CHAT))


async def test_an_adapter_answers_only_while_it_is_in_use(made: FakeSidecar) -> None:
    made.phi3.state = ModelStatus(adapter=Adapter(Path("20260102")))
    assert (await answered(made, "phi3:20260102", Conversation(CHAT)))[-1] == end(WRITTEN, "true")
    # A swap between the check and the first token.
    for conversation in (Conversation(CHAT), Conversation(CHAT, is_free_text=True)):
        made.phi3.answers = [replace(WRITTEN, adapter="20260103")]
        with pytest.raises(NotFound, match="not in use"):
            await answered(made, "phi3:20260102", conversation)


# Proposals


async def test_phi3_writes_a_proposal_with_the_system_prompt_in_front(made: FakeSidecar) -> None:
    parts = await answered(made, "phi3", Conversation(CHAT))
    assert parts[-1] == end(WRITTEN, "true")
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    assert text == WRITTEN.text
    assert made.phi3.requests == [
        GenerationRequest(
            proposals.build_messages(PROMPT),
            proposals.MAX_COMPLETION_TOKENS,
            proposals.GUIDANCE,
            0.0,
        )
    ]
    assert made.happened.log == [("metric", "proposed", ("adjust",))]


async def test_with_a_system_turn_the_chat_is_used_as_it_is(made: FakeSidecar) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    conversation = Conversation(chat, 200, 0.5, 0.9, 3, logprobs=0)
    await answered(made, "phi3", conversation)
    assert made.phi3.requests == [
        GenerationRequest(chat, 200, proposals.guidance(200), 0.5, 3, top_p=0.9, logprobs=0)
    ]


async def test_a_sampled_proposal_has_a_seed(made: FakeSidecar) -> None:
    await answered(made, "phi3", Conversation(CHAT, temperature=0.5))
    (request,) = made.phi3.requests
    assert isinstance(request, GenerationRequest)
    assert (request.temperature, request.seed) == (0.5, SEED)


async def test_all_turns_of_the_user_are_the_context_of_a_proposal(made: FakeSidecar) -> None:
    first, second = PROMPT.split(", ")
    chat = [user(first), {"role": "assistant", "content": "ZZZ"}, user(second)]
    made.phi3.answers = [WRITTEN]
    parts = await answered(made, "phi3", Conversation(chat))
    assert parts[-1] == end(WRITTEN, "true")
    made.phi3.answers = [UNGROUNDED]
    parts = await answered(made, "phi3", Conversation(chat))
    assert parts[-1] == end(UNGROUNDED, "ticker,rationale")


async def test_a_proposal_that_may_be_written_twice_is_one_part() -> None:
    made = fake_sidecar(proposals={"grounding": "retry"})
    made.phi3.answers = [UNGROUNDED, WRITTEN]
    parts = await answered(made, "phi3", Conversation(CHAT))
    assert parts == [TextPart(WRITTEN.text), end(WRITTEN, "true")]


async def test_an_invalid_proposal_does_not_leave_with_the_valid_one(made: FakeSidecar) -> None:
    made.phi3.valid_by_construction = False
    invalid = replace(completion("Buy it."), logprobs=(TOKEN,))
    written = replace(WRITTEN, logprobs=(replace(TOKEN, logprob=-0.25),))
    made.phi3.answers = [invalid, written]
    parts = await answered(made, "phi3", Conversation(CHAT, logprobs=0))
    assert parts == [TextPart(written.text, written.logprobs), end(written, "true")]


async def test_a_proposal_that_is_valid_by_construction_streams(made: FakeSidecar) -> None:
    parts = await answered(made, "phi3", Conversation(CHAT))
    assert [type(part) for part in parts] == [TextPart, TextPart, Finished]


@pytest.mark.parametrize(
    ("changes", "field"), [({"stop": ("x",)}, "stop"), ({"max_tokens": 95}, "max_length")]
)
async def test_a_proposal_is_never_cut(
    made: FakeSidecar, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: a proposal"):
        await answered(made, "phi3", Conversation(CHAT, **changes))
    assert made.phi3.requests == []


@pytest.mark.parametrize(
    "changes",
    [
        {"is_free_text": True},
        {"schema": {"type": "object"}},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
)
async def test_phi3_follows_a_format_or_a_tool_of_the_client(
    made: FakeSidecar, changes: dict[str, Any]
) -> None:
    made.phi3.answers = [TEXT]
    parts = await answered(made, "phi3", Conversation(CHAT, **changes))
    assert parts[-1] == end(TEXT)
    schema = changes.get("schema")
    guidance = None if schema is None else guidance_of(schema)
    assert made.phi3.requests == [
        GenerationRequest(
            CHAT,
            MAX_TOKENS,
            guidance,
            0.0,
            fit_context=True,
            check_answer=guidance is not None,
        )
    ]


# Tools


async def test_a_call_is_guided_and_read(made: FakeSidecar) -> None:
    made.hermes.answers = [completion('{"name":"close","arguments":{}}')]
    parts = await answered(made, "hermes", Conversation(CHAT, tools=TOOLS))
    calls = [part for part in parts if isinstance(part, ToolCallPart)]
    assert [part.name for part in calls] == ["close"] * len(calls)
    assert "".join(part.arguments for part in calls) == "{}"
    assert isinstance(parts[-1], Finished)
    assert parts[-1].reason == "tool_calls"
    text = instructions(TOOLS, "auto", has_schema=False)
    (request,) = made.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert request.messages == [{"role": "system", "content": text}, *CHAT]
    assert request.guidance == guidance_of(answer_schema(TOOLS, "auto", None))
    assert request.check_answer


async def test_text_beside_tools_is_read(made: FakeSidecar) -> None:
    made.hermes.answers = [completion('{"text":"Hold it."}')]
    parts = await answered(made, "hermes", Conversation(CHAT, tools=TOOLS))
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == "Hold it."
    assert isinstance(parts[-1], Finished)
    assert parts[-1].reason == "stop"


async def test_the_schema_of_an_answer_stands_beside_the_tools(made: FakeSidecar) -> None:
    made.hermes.answers = [completion('{"answer":{"a":1}}')]
    schema = {"type": "object"}
    parts = await answered(made, "hermes", Conversation(CHAT, schema=schema, tools=TOOLS))
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == '{"a":1}'
    (request,) = made.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert request.guidance == guidance_of(answer_schema(TOOLS, "auto", schema))


async def test_a_call_that_was_cut_has_the_reason_length(made: FakeSidecar) -> None:
    made.hermes.answers = [completion('{"name":"close","arguments":{"a', finish_reason="length")]
    conversation = Conversation(CHAT, tools=TOOLS, tool_choice="required")
    parts = await answered(made, "hermes", conversation)
    assert isinstance(parts[-1], Finished)
    assert parts[-1].reason == "length"


async def test_the_error_of_a_schema_names_the_tools(made: FakeSidecar) -> None:
    for conversation, field in (
        (Conversation(CHAT, tools=TOOLS), "tools"),
        (Conversation(CHAT, schema={}), "schema"),
        (Conversation(CHAT, tools=TOOLS, schema={}), None),
    ):
        made.hermes.answers = [InvalidRequest("not is not supported; leave it out", field="schema")]
        with pytest.raises(InvalidRequest, match="not is not supported") as caught:
            await answered(made, "hermes", conversation)
        assert caught.value.field == field


async def test_log_probabilities_and_tools_exclude_each_other(made: FakeSidecar) -> None:
    with pytest.raises(InvalidRequest, match="with tools they are not supported"):
        await answered(made, "hermes", Conversation(CHAT, tools=TOOLS, logprobs=0))


# Texts without a template


async def completed(made: FakeSidecar, model: str, prompt: TextPrompt) -> list[Part]:
    parts: AsyncGenerator[Part, None] = made.sidecar.conversations.complete(model, prompt)
    return [part async for part in parts]


async def test_a_text_is_continued_without_a_template(made: FakeSidecar) -> None:
    made.phi3.answers = [TEXT]
    prompt = TextPrompt("AAPL is", 4, 0.5, 0.9, 7, (), 1, 2)
    assert (await completed(made, "phi3", prompt))[-1] == end(TEXT)
    expected = GenerationRequest(
        (), 4, None, 0.5, 7, text="AAPL is", top_p=0.9, logprobs=1, prompt_logprobs=2
    )
    assert made.phi3.requests == [expected]


async def test_tokens_are_continued_and_their_log_probabilities_come_first(
    made: FakeSidecar,
) -> None:
    made.hermes.answers = [
        [
            Delta("", "hermes/fake", prompt_logprobs=(TOKEN,), prompt_text="Hold"),
            Delta(" it.", "hermes/fake", completion_tokens=1, finish_reason="length"),
        ]
    ]
    parts = await completed(made, "hermes", TextPrompt([1], 1, prompt_logprobs=0, echo=True))
    assert parts[:2] == [TextPart("", (), (TOKEN,), "Hold"), TextPart(" it.")]
    assert made.hermes.requests == [
        GenerationRequest((), 1, temperature=0.3, tokens=[1], prompt_logprobs=0, echo=True)
    ]

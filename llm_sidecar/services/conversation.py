"""Chats of clients that bring their own messages, answer formats and tools.

conversations = Conversations(served_models, proposer, settings)
async for part in conversations.answer("hermes", Conversation(messages), deadline):
    ...  # TextPart, ToolCallPart, ..., and finally Finished
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from llm_sidecar import proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.base import Completion, Delta, GenerationRequest, Message
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.answers import (
    Finished,
    Part,
    Reason,
    TextAnswer,
    TextPart,
    ToolCallPart,
)
from llm_sidecar.services.client_schemas import guidance_of
from llm_sidecar.services.propose import Proposer
from llm_sidecar.services.served_form import served_form, with_system_text
from llm_sidecar.services.served_models import HERMES, ServedModels
from llm_sidecar.services.tool_answers import ToolAnswer
from llm_sidecar.services.tools import Tool, ToolChoice, answer_schema, instructions
from llm_sidecar.settings import Settings

__all__ = [
    "Conversation",
    "Conversations",
    "Finished",
    "Part",
    "TextPart",
    "TextPrompt",
    "Tool",
    "ToolCallPart",
    "ToolChoice",
]

MAX_TOKENS: Final = 1024
"""Maximum number of completion tokens if the request sets no limit; the context may leave fewer."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat and how to answer it.

    Attributes:
        messages: the chat, oldest first; roles are system, user and assistant. Tool calls and their
            results are text in it: see `tools.call_text` and `tools.result_text`. The answer
            continues a last turn of the assistant's.
        max_tokens: maximum number of completion tokens; None for what the context leaves, up to
            `MAX_TOKENS`.
        temperature, top_p: of sampling; None for the model's own.
        seed: makes sampling repeatable.
        stop: texts before which the answer ends.
        schema: JSON schema that the answer follows; `{"type": "object"}` for any object. None for
            free text or, from phi3 without tools, a proposal.
        is_free_text: whether the client asked for text explicitly, so that phi3 writes no proposal.
        tools: the functions that the model may call.
        tool_choice: see `ToolChoice`.
        logprobs: see `GenerationRequest`.
    """

    messages: Sequence[Message]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    is_free_text: bool = False
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text to continue, without a chat template.

    Attributes:
        prompt: the text, or its tokens.
        prompt_logprobs, echo: see `GenerationRequest`.

    The others are as in `Conversation`.
    """

    prompt: str | Sequence[int]
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False


class Conversations:
    """Answers conversations with phi3 or hermes."""

    def __init__(self, served: ServedModels, proposer: Proposer, settings: Settings) -> None:
        """Calls no model yet.

        Args:
            served: finds the models.
            proposer: writes proposals.
            settings: the models' temperatures, and the time limit of a request.
        """
        self._served = served
        self._proposer = proposer
        self._settings = settings
        self._timeout = settings.limits.request_timeout

    def answer(
        self, model: str, conversation: Conversation, deadline: Deadline | None = None
    ) -> AsyncGenerator[Part, None]:
        """Streams the answer; its last part is `Finished`.

        phi3 writes a proposal unless the conversation has a schema or tools, or asks for free text.
        At the deadline, a proposal fails; any other answer ends with the text so far.

        Args:
            model: `phi3`, `hermes`, or `phi3:` and the name of the adapter in use.
            conversation: the chat.
            deadline: default: the time limit of all requests.

        Raises:
            NotFound: there is no such model, or its adapter is not in use.
            InvalidRequest: a schema has unsupported keywords, which the error names, or the chat
                does not fit.
            QueueFull, ModelUnavailable, DeadlineExceeded
        """
        chat_model = self._served.find(model)
        deadline = deadline or Deadline.after(self._timeout)
        conversation = replace(conversation, messages=served_form(conversation.messages))
        tools = () if conversation.tool_choice == "none" else conversation.tools
        if model != HERMES and _wants_proposal(conversation):
            return self._proposal(model, conversation, deadline)
        request = self._request(model, conversation, tools)
        deltas = chat_model.stream(request, deadline, allow_partial=True)
        if tools:
            parts = self._answered(model, deltas, ToolAnswer(conversation.stop))
            return _with_tools(parts, has_schema=conversation.schema is not None)
        return self._answered(model, deltas, TextAnswer(conversation.stop))

    def complete(
        self, model: str, prompt: TextPrompt, deadline: Deadline | None = None
    ) -> AsyncGenerator[Part, None]:
        """Streams the continuation of a text; its last part is `Finished`.

        phi3 writes no proposal.

        Raises:
            NotFound, InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded: as `answer`.
        """
        chat_model = self._served.find(model)
        deadline = deadline or Deadline.after(self._timeout)
        is_text = isinstance(prompt.prompt, str)
        request = GenerationRequest(
            (),
            prompt.max_tokens,
            temperature=self._temperature(model, prompt.temperature),
            seed=prompt.seed,
            tokens=None if is_text else cast(Sequence[int], prompt.prompt),
            text=cast(str, prompt.prompt) if is_text else None,
            top_p=prompt.top_p,
            logprobs=prompt.logprobs,
            prompt_logprobs=prompt.prompt_logprobs,
            echo=prompt.echo,
        )
        deltas = chat_model.stream(request, deadline, allow_partial=True)
        return self._answered(model, deltas, TextAnswer(prompt.stop))

    def _request(
        self, model: str, conversation: Conversation, tools: tuple[Tool, ...]
    ) -> GenerationRequest:
        messages, schema = conversation.messages, conversation.schema
        if tools:
            if conversation.logprobs is not None:
                raise InvalidRequest(
                    "with tools they are not supported; leave one of the two out", field="logprobs"
                )
            choice = conversation.tool_choice
            added = instructions(tools, choice, has_schema=schema is not None)
            messages = with_system_text(messages, added)
            schema = answer_schema(tools, choice, schema)
        return GenerationRequest(
            messages,
            MAX_TOKENS if conversation.max_tokens is None else conversation.max_tokens,
            None if schema is None else guidance_of(schema),
            self._temperature(model, conversation.temperature),
            conversation.seed,
            top_p=conversation.top_p,
            logprobs=conversation.logprobs,
            fit_context=conversation.max_tokens is None,
            check_answer=schema is not None,
        )

    def _temperature(self, model: str, wanted: float | None) -> float | None:
        if wanted is not None:
            return wanted
        models = self._settings.models
        return models.hermes_temperature if model == HERMES else models.phi3_temperature

    async def _answered(
        self, model: str, stream: AsyncGenerator[Delta, None], answer: TextAnswer | ToolAnswer
    ) -> AsyncGenerator[Part, None]:
        """The parts of a generation."""
        last: Delta | None = None
        async with contextlib.aclosing(stream):
            async for delta in stream:
                if last is None:
                    self._served.check_adapter(model, delta.adapter)
                last = delta
                if delta.prompt_logprobs or delta.prompt_text:
                    yield TextPart("", (), delta.prompt_logprobs, delta.prompt_text)
                for part in answer.feed(delta.text, delta.logprobs):
                    yield part
                if answer.stopped:
                    last = replace(delta, finish_reason="stop")
                    break
        completion = _without_text(Completion.of([] if last is None else [last]))
        is_whole = completion.finish_reason == "stop" and not answer.stopped
        for part in answer.finish(is_whole=is_whole):
            yield part
        reason: Reason = "stop" if completion.finish_reason == "stop" else "length"
        if answer.has_call and is_whole:
            reason = "tool_calls"
        yield Finished(reason, completion, at_stop_text=answer.stopped)

    async def _proposal(
        self, model: str, conversation: Conversation, deadline: Deadline
    ) -> AsyncGenerator[Part, None]:
        """The parts of a proposal. Its text is one part if it may be generated twice."""
        if conversation.stop:
            raise InvalidRequest("a proposal is never truncated; leave it out", field="stop")
        max_tokens = conversation.max_tokens
        items = self._proposer.answer(
            conversation.messages,
            proposals.MAX_COMPLETION_TOKENS if max_tokens is None else max_tokens,
            deadline,
            temperature=conversation.temperature,
            top_p=conversation.top_p,
            seed=conversation.seed,
            logprobs=conversation.logprobs,
        )
        as_one = self._proposer.may_repeat
        async with contextlib.aclosing(items):
            async for item in items:
                if isinstance(item, Proposed):
                    completion = item.completion
                    if as_one:
                        yield TextPart(completion.text, completion.logprobs)
                    yield Finished("stop", _without_text(completion), item.grounded)
                    return
                self._served.check_adapter(model, item.adapter)
                if not as_one and (item.text or item.logprobs):
                    yield TextPart(item.text, item.logprobs)


async def _with_tools(
    parts: AsyncGenerator[Part, None], *, has_schema: bool
) -> AsyncGenerator[Part, None]:
    """The parts of an answer with tools; an error of their schema names the tools.

    If the answer has a schema, too, the model follows both as one schema. The error then names no
    field.
    """
    async with contextlib.aclosing(parts):
        try:
            async for part in parts:
                yield part
        except InvalidRequest as error:
            if error.field != "schema":
                raise
            if has_schema:
                raise InvalidRequest(
                    f"The schema of the answer or of a tool is not usable: {error.problem}"
                ) from None
            raise InvalidRequest(error.problem, field="tools") from None


def _without_text(completion: Completion) -> Completion:
    return replace(completion, text="", logprobs=(), prompt_logprobs=())


def _wants_proposal(conversation: Conversation) -> bool:
    return conversation.schema is None and not conversation.tools and not conversation.is_free_text

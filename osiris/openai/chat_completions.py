"""`/v1/chat/completions`: chats, with tools and answer formats of the client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from llm_sidecar.deadline import Deadline
from llm_sidecar.services.conversation import Conversation, Part
from llm_sidecar.sidecar import Sidecar
from osiris.dependencies import CurrentSidecar
from osiris.disconnects import cancel_on_disconnect
from osiris.event_stream import Events, event_stream
from osiris.openai.answers import headers_of
from osiris.openai.chat_input import conversation_of
from osiris.openai.chat_output import ChatChoice, ChatChunks, whole_answer
from osiris.openai.endpoint import GENERATION_ERRORS, STREAM, openai_endpoint
from osiris.openai.errors import error_event
from osiris.openai.events import DONE, json_event
from osiris.openai.logprobs import bounded
from osiris.openai.parallel import merged
from osiris.openai.schemas.chat import ChatRequest
from osiris.openai.schemas.chat_answer import ChatAnswer
from osiris.response_headers import GENERATION

router = APIRouter(tags=["openai"])


@openai_endpoint(
    router,
    "POST",
    "/v1/chat/completions",
    *GENERATION_ERRORS,
    optional_headers=(*GENERATION, "X-Grounded"),
    content=STREAM,
    response_model=ChatAnswer,
    response_description="The answer, or with `stream` its chunks as server-sent events",
)
async def create_chat_completion(
    body: ChatRequest, request: Request, sidecar: CurrentSidecar
) -> Response:
    """Answers a chat.

    `phi3` writes a proposal, unless the request has a `response_format` or `tools`. Only a proposal
    has `X-Grounded`.

    The events of a stream have no names. The `data` of each is a `chat.completion.chunk`; that of
    the last one is `[DONE]`. If the answer fails in the middle, the last one is an error object.
    Comments keep the connection open. A stream has none of the headers of a generation.
    """
    conversation = conversation_of(body, sidecar.settings.limits.max_prompt_chars)
    parts = _parts(sidecar, body, conversation)
    if body.stream:
        return await event_stream(
            request, _events(body, parts), functools.partial(error_event, request)
        )
    return await cancel_on_disconnect(request, _whole(body, parts))


def _parts(
    sidecar: Sidecar, body: ChatRequest, conversation: Conversation
) -> AsyncGenerator[tuple[int, Part], None]:
    """The parts of all choices, each with the number of its choice."""
    deadline = Deadline.after(sidecar.settings.limits.request_timeout)
    parts = merged(
        [
            sidecar.conversations.answer(
                body.model, replace(conversation, seed=body.seed_of(number)), deadline
            )
            for number in range(body.choices)
        ]
    )
    return bounded(parts) if body.logprobs else parts


async def _whole(body: ChatRequest, parts: AsyncGenerator[tuple[int, Part], None]) -> Response:
    choices = [ChatChoice(bool(body.logprobs)) for _ in range(body.choices)]
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            choices[number].add(part)
    finished = [choice.finished for choice in choices if choice.finished is not None]
    headers = headers_of(finished)
    if not body.logprobs:
        return _answer(body, choices, headers)
    # In a thread: the log probabilities may be megabytes of JSON.
    return await asyncio.to_thread(_answer, body, choices, headers)


def _answer(body: ChatRequest, choices: list[ChatChoice], headers: dict[str, str]) -> Response:
    return JSONResponse(whole_answer(body.model, choices), headers=headers)


async def _events(body: ChatRequest, parts: AsyncGenerator[tuple[int, Part], None]) -> Events:
    chunks = ChatChunks(
        body.model, with_logprobs=bool(body.logprobs), with_usage=body.includes_usage
    )
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            for chunk in chunks.of(number, part):
                yield json_event(chunk)
    for chunk in chunks.end():
        yield json_event(chunk)
    yield DONE

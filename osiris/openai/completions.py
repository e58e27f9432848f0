"""`/v1/completions`: continues texts without a chat template, mostly for evaluation harnesses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import ServerSentEvent

from llm_sidecar.deadline import Deadline
from llm_sidecar.services.conversation import Part, TextPart, TextPrompt
from llm_sidecar.sidecar import Sidecar
from osiris.dependencies import CurrentSidecar
from osiris.disconnects import cancel_on_disconnect
from osiris.event_stream import Events, event_stream
from osiris.openai.answers import headers_of, new_head, usage
from osiris.openai.completion_output import CompletionChoice, Piece, joined
from osiris.openai.endpoint import GENERATION_ERRORS, STREAM, openai_endpoint
from osiris.openai.errors import bad_field, error_event
from osiris.openai.events import DONE, json_event
from osiris.openai.limits import check_chars
from osiris.openai.logprobs import bounded
from osiris.openai.parallel import merged
from osiris.openai.schemas.completions import CompletionAnswer, CompletionRequest, Prompt
from osiris.response_headers import GENERATION

router = APIRouter(tags=["openai"])

_MAX_TOKENS: Final = 16
"""The default of OpenAI's API."""

_MAX_CHOICES: Final = 128

_MANY_TOKENS: Final = 64
"""Tokens whose log probabilities may be written on the event loop at a time."""

Parts = AsyncGenerator[tuple[int, Part], None]


@openai_endpoint(
    router,
    "POST",
    "/v1/completions",
    *GENERATION_ERRORS,
    optional_headers=GENERATION,
    content=STREAM,
    response_model=CompletionAnswer,
    response_description="The texts, or with `stream` their pieces as server-sent events",
)
async def create_completion(
    body: CompletionRequest, request: Request, sidecar: CurrentSidecar
) -> Response:
    """Continues one or several texts, without a chat template; phi3 writes no proposal.

    A prompt can contain control tokens as tokens, but not as text. A stream has the format of a
    chat's.
    """
    _check(body, sidecar.settings.limits.max_prompt_chars)
    parts = _parts(sidecar, body)
    if body.stream:
        return await event_stream(
            request, _events(body, parts), functools.partial(error_event, request)
        )
    return await cancel_on_disconnect(request, _whole(body, parts))


def _check(body: CompletionRequest, max_chars: int) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise bad_field("max_tokens", "It should be at least 1 without echo")
    # A token has at least one character.
    check_chars("prompt", sum(map(len, body.prompt)), max_chars)
    if len(body.prompt) * body.choices > _MAX_CHOICES:
        raise bad_field("n", f"All prompts together should have at most {_MAX_CHOICES} choices")


def _parts(sidecar: Sidecar, body: CompletionRequest) -> Parts:
    deadline = Deadline.after(sidecar.settings.limits.request_timeout)
    choices = [
        choice for prompt in body.prompt for choice in _choices(sidecar, body, prompt, deadline)
    ]
    parts = merged(choices)
    return parts if body.logprobs is None else bounded(parts)


def _choices(
    sidecar: Sidecar, body: CompletionRequest, prompt: Prompt, deadline: Deadline
) -> list[AsyncGenerator[Part, None]]:
    """The parts of each choice of a prompt. Only the first choice computes the log probabilities of
    the prompt; the others wait for them."""
    first, *others = [
        sidecar.conversations.complete(body.model, _prompt(body, prompt, number), deadline)
        for number in range(body.choices)
    ]
    if not (others and _has_prompt_logprobs(body)):
        return [first, *others]
    shared = asyncio.get_running_loop().create_future()
    return [_sharing(first, shared), *(_after(shared, choice) for choice in others)]


async def _sharing(
    parts: AsyncGenerator[Part, None], shared: asyncio.Future[TextPart]
) -> AsyncGenerator[Part, None]:
    """The parts of a choice; the one with the log probabilities of the prompt is shared."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            if isinstance(part, TextPart) and part.prompt_logprobs and not shared.done():
                shared.set_result(replace(part, text="", logprobs=()))
            yield part
    if not shared.done():
        shared.set_result(TextPart(""))


async def _after(
    shared: asyncio.Future[TextPart], parts: AsyncGenerator[Part, None]
) -> AsyncGenerator[Part, None]:
    """The shared part, and then the parts of another choice of the same prompt."""
    yield await asyncio.shield(shared)
    async with contextlib.aclosing(parts):
        async for part in parts:
            yield part


def _has_prompt_logprobs(body: CompletionRequest) -> bool:
    return bool(body.echo) and body.logprobs is not None


def _prompt(body: CompletionRequest, prompt: Prompt, number: int) -> TextPrompt:
    is_shared = number > 0 and _has_prompt_logprobs(body)
    echo = bool(body.echo) and not is_shared
    return TextPrompt(
        prompt,
        _MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        body.temperature,
        body.top_p,
        body.seed_of(number),
        tuple(body.stop),
        body.logprobs,
        body.logprobs if echo else None,
        echo=echo and not isinstance(prompt, str),
    )


def _new_choices(body: CompletionRequest) -> list[CompletionChoice]:
    return [CompletionChoice(body, prompt) for prompt in body.prompt for _ in range(body.choices)]


async def _whole(body: CompletionRequest, parts: Parts) -> Response:
    parts_of: list[list[Part]] = [[] for _ in range(len(body.prompt) * body.choices)]
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            parts_of[number].append(part)
    if body.logprobs is None:
        return _answer(body, parts_of)
    # In a thread: the log probabilities may be megabytes of JSON.
    return await asyncio.to_thread(_answer, body, parts_of)


def _answer(body: CompletionRequest, parts_of: list[list[Part]]) -> Response:
    """The answer with the parts of each choice."""
    choices = _new_choices(body)
    pieces = [
        joined([choice.of(part) for part in parts])
        for choice, parts in zip(choices, parts_of, strict=True)
    ]
    finished = [choice.finished for choice in choices if choice.finished is not None]
    shown = [
        _choice(number, piece, end.reason)
        for number, (piece, end) in enumerate(zip(pieces, finished, strict=True))
    ]
    prompts = len(body.prompt)
    answer = {
        **new_head("cmpl", "text_completion", body.model),
        "choices": shown,
        "usage": usage(finished, prompts),
    }
    return JSONResponse(answer, headers=headers_of(finished, prompts))


async def _events(body: CompletionRequest, parts: Parts) -> Events:
    head = new_head("cmpl", "text_completion", body.model)
    if body.includes_usage:
        head |= {"usage": None}
    choices = _new_choices(body)
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            event = functools.partial(_event, head, number, choices[number], part)
            # In a thread, if it is many kilobytes of JSON.
            shown = await asyncio.to_thread(event) if _is_long(part) else event()
            if shown is not None:
                yield shown
    if body.includes_usage:
        finished = [choice.finished for choice in choices if choice.finished is not None]
        counts = usage(finished, len(body.prompt))
        yield json_event({**head, "choices": [], "usage": counts})
    yield DONE


def _is_long(part: Part) -> bool:
    return (
        isinstance(part, TextPart) and len(part.prompt_logprobs) + len(part.logprobs) > _MANY_TOKENS
    )


def _event(
    head: dict[str, Any], number: int, choice: CompletionChoice, part: Part
) -> ServerSentEvent | None:
    """The event of the next part of a choice, unless it adds nothing."""
    piece = choice.of(part)
    reason = None if choice.finished is None else choice.finished.reason
    if not (piece.text or reason or (piece.logprobs and piece.logprobs["tokens"])):
        return None
    return json_event({**head, "choices": [_choice(number, piece, reason)]})


def _choice(number: int, piece: Piece, reason: str | None) -> dict[str, Any]:
    return {
        "index": number,
        "text": piece.text,
        "logprobs": piece.logprobs,
        "finish_reason": reason,
    }

"""`/v1/completions`: continues texts without a chat template, mostly for evaluation harnesses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from llm_sidecar.deadline import Deadline
from llm_sidecar.services.conversation import Part, TextPart, TextPrompt
from llm_sidecar.sidecar import Sidecar
from osiris.dependencies import CurrentSidecar
from osiris.disconnects import cancel_on_disconnect
from osiris.event_stream import Events, event_stream
from osiris.openai.answers import headers_of, new_head, usage
from osiris.openai.chat_input import check_chars
from osiris.openai.completion_output import CompletionChoice, Piece, joined
from osiris.openai.endpoint import GENERATION_ERRORS, STREAM, openai_endpoint
from osiris.openai.errors import bad_field, error_event
from osiris.openai.events import DONE, json_event
from osiris.openai.logprobs import bounded
from osiris.openai.parallel import merged
from osiris.openai.schemas.completions import CompletionAnswer, CompletionRequest, Prompt
from osiris.response_headers import GENERATION

router = APIRouter(tags=["openai"])

_MAX_TOKENS: Final = 16
"""The default of OpenAI's API."""

_MAX_CHOICES: Final = 128

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
    choices = [
        CompletionChoice(body, prompt) for prompt in body.prompt for _ in range(body.choices)
    ]
    parts = _parts(sidecar, body)
    if body.stream:
        return await event_stream(
            request, _events(body, choices, parts), functools.partial(error_event, request)
        )
    return await cancel_on_disconnect(request, _whole(body, choices, parts))


def _check(body: CompletionRequest, max_chars: int) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise bad_field("max_tokens", "It should be at least 1 without echo")
    # A token has at least one character.
    check_chars("prompt", sum(map(len, body.prompt)), max_chars)
    if len(body.prompt) * body.choices > _MAX_CHOICES:
        raise bad_field("n", f"All prompts together should have at most {_MAX_CHOICES} choices")


def _parts(sidecar: Sidecar, body: CompletionRequest) -> Parts:
    deadline = Deadline.after(sidecar.settings.limits.request_timeout)
    parts = merged(
        [one for prompt in body.prompt for one in _choices(sidecar, body, prompt, deadline)]
    )
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
    if not others or _prompt_logprobs(body, prompt) is None:
        return [first, *others]
    shared = asyncio.get_running_loop().create_future()
    return [_sharing(first, shared), *(_after(shared, one) for one in others)]


async def _sharing(
    parts: AsyncGenerator[Part, None], shared: asyncio.Future[TextPart]
) -> AsyncGenerator[Part, None]:
    """The parts of a choice; the one with the log probabilities of the prompt is shared."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            if isinstance(part, TextPart) and part.prompt_logprobs and not shared.done():
                shared.set_result(TextPart("", (), part.prompt_logprobs))
            yield part
    if not shared.done():
        shared.set_result(TextPart(""))


async def _after(
    shared: asyncio.Future[TextPart], parts: AsyncGenerator[Part, None]
) -> AsyncGenerator[Part, None]:
    """The shared part, and then those of another choice."""
    yield await asyncio.shield(shared)
    async with contextlib.aclosing(parts):
        async for part in parts:
            yield part


def _prompt_logprobs(body: CompletionRequest, prompt: Prompt) -> int | None:
    if body.echo and not isinstance(prompt, str):
        # The log probabilities include the text of the tokens.
        return body.logprobs or 0
    return body.logprobs if body.echo else None


def _prompt(body: CompletionRequest, prompt: Prompt, number: int) -> TextPrompt:
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return TextPrompt(
        prompt,
        # A model generates at least one token.
        max(1, max_tokens),
        body.temperature,
        body.top_p,
        body.seed_of(number),
        tuple(body.stop),
        body.logprobs,
        _prompt_logprobs(body, prompt) if number == 0 else None,
    )


async def _whole(
    body: CompletionRequest, choices: list[CompletionChoice], parts: Parts
) -> Response:
    pieces: list[list[Piece]] = [[] for _ in choices]
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            pieces[number].append(choices[number].of(part))
    if body.logprobs is None:
        return _answer(body, choices, pieces)
    # In a thread: the log probabilities may be megabytes of JSON.
    return await asyncio.to_thread(_answer, body, choices, pieces)


def _answer(
    body: CompletionRequest, choices: list[CompletionChoice], pieces: list[list[Piece]]
) -> Response:
    finished = [choice.finished for choice in choices if choice.finished is not None]
    shown = [
        _choice(number, joined(found), finished[number].reason)
        for number, found in enumerate(pieces)
    ]
    prompts = len(body.prompt)
    answer = {
        **new_head("cmpl", "text_completion", body.model),
        "choices": shown,
        "usage": usage(finished, prompts),
    }
    return JSONResponse(answer, headers=headers_of(finished, prompts))


async def _events(body: CompletionRequest, choices: list[CompletionChoice], parts: Parts) -> Events:
    head = new_head("cmpl", "text_completion", body.model)
    without_usage = {"usage": None} if body.includes_usage else {}
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            choice = choices[number]
            piece = choice.of(part)
            reason = None if choice.finished is None else choice.finished.reason
            if piece.text or reason or (piece.logprobs and piece.logprobs["tokens"]):
                yield json_event(
                    {**head, "choices": [_choice(number, piece, reason)], **without_usage}
                )
    if body.includes_usage:
        finished = [choice.finished for choice in choices if choice.finished is not None]
        yield json_event({**head, "choices": [], "usage": usage(finished, len(body.prompt))})
    yield DONE


def _choice(number: int, piece: Piece, reason: str | None) -> dict[str, Any]:
    return {
        "index": number,
        "text": piece.text,
        "logprobs": piece.logprobs,
        "finish_reason": reason,
    }

"""Requests the probabilities of some answers from one server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import TokenLogprob
from llm_sidecar.models.base import ChoiceScores, Message, Question, RefusedRequest
from llm_sidecar.models.remote import scores
from llm_sidecar.models.remote.chunks import Chunk, read_chunk
from llm_sidecar.models.remote.decisions import decision_body, read_decision
from llm_sidecar.models.remote.guiding import FREE_TEXT, forced, forced_number
from llm_sidecar.models.remote.refusals import Refused
from llm_sidecar.models.remote.server import Server
from llm_sidecar.telemetry.calls import ModelCall

_CONTINUE: Final = {"continue_final_message": True, "add_generation_prompt": False}
"""Continues the assistant's turn. Without these fields, vLLM ends it and begins another one."""


async def score(
    server: Server, call: ModelCall, question: Question, deadline: Deadline
) -> AsyncGenerator[ChoiceScores, None]:
    """Scores the answers to a question on one server; yields once. See `scores`."""
    messages, choices = question.messages, question.choices
    with server.asking(call):
        # Read before the answer: a swap may change the model, and another question the call.
        model, adapter = server.served_name, call.adapter
        probabilities = await _by_decision(server, model, messages, choices, deadline)
        if probabilities is None:
            probabilities = await _by_answer(server, model, messages, choices, deadline)
    yield ChoiceScores(probabilities, adapter=adapter)


async def _by_decision(
    server: Server,
    model: str,
    messages: Sequence[Message],
    choices: Sequence[str],
    deadline: Deadline,
) -> dict[str, float] | None:
    """The probabilities by `/v1/decisions`; None if the server does not answer this question."""
    assert server.capabilities is not None
    if not server.capabilities.decisions:
        return None
    body = decision_body(model, scores.question_text(messages), choices)
    try:
        decision = read_decision(await server.connection.post("/decisions", body, deadline))
    except (Refused, RefusedRequest, ValueError) as error:
        server.refuses_decision(error)
        return None
    return {choice: decision.get(choice, 0.0) for choice in choices}


async def _by_answer(
    server: Server,
    model: str,
    messages: Sequence[Message],
    choices: Sequence[str],
    deadline: Deadline,
) -> dict[str, float]:
    """The probabilities from the beginning of an answer: its log probabilities, else its text."""
    assert server.capabilities is not None
    start = scores.start_of_answer(messages)
    try:
        answer = await _answer(server, model, messages, {}, deadline)
    except (Refused, RefusedRequest):
        if not start:
            raise
        # Not every chat template accepts an unfinished turn of the assistant, and not every server
        # the fields that continue it.
        messages, start = messages[:-1], ""
        answer = await _answer(server, model, messages, {}, deadline)
    if not scores.are_possible(answer.logprobs, start):
        return scores.from_text(answer.text, start, choices)
    answers = [answer.logprobs]
    text = scores.undecided(answers, start, choices, scores.LEAST_DIVIDED)
    if text is not None:
        answers.append(await _forced(server, model, messages, text, answer.logprobs, deadline))
        if scores.undecided(answers, start, choices, scores.MOST_UNDECIDED) is not None:
            return scores.from_text(answer.text, start, choices)
    return scores.from_logprobs(answers, start, choices)


async def _forced(
    server: Server,
    model: str,
    messages: Sequence[Message],
    text: str,
    free: Sequence[TokenLogprob],
    deadline: Deadline,
) -> tuple[TokenLogprob, ...]:
    """The tokens of an answer that has to begin with a text; none if they cannot be known.

    Args:
        free: the tokens of the answer without force.
    """
    assert server.capabilities is not None
    schema_formats = server.capabilities.schema_formats
    if fields := forced(schema_formats, text):
        return (await _answer(server, model, messages, fields, deadline)).logprobs
    if not (fields := forced_number(schema_formats, text)):
        return ()
    try:
        tokens = (await _answer(server, model, messages, fields, deadline)).logprobs
    except (Refused, RefusedRequest):
        # Some servers accept schemas of objects only.
        return ()
    return tokens if scores.is_unguided(tokens, free) else ()


async def _answer(
    server: Server,
    model: str,
    messages: Sequence[Message],
    fields: dict[str, Any],
    deadline: Deadline,
) -> Chunk:
    assert server.capabilities is not None
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": scores.ANSWER_TOKENS,
        "temperature": 0.0,
        **(fields or FREE_TEXT),
    }
    if scores.start_of_answer(messages):
        body |= _CONTINUE
    if server.capabilities.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": server.capabilities.top_logprobs}
    answer = await server.connection.post("/chat/completions", body, deadline)
    return read_chunk(server.connection.name, answer)

"""`/v1/decisions`: typed questions about an input, answered with probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, Request

from llm_sidecar.deadline import Deadline
from llm_sidecar.services import decisions
from llm_sidecar.services.decisions import Decided, Input, Option
from osiris.dependencies import CurrentSidecar
from osiris.disconnects import cancel_on_disconnect
from osiris.openai.endpoint import openai_endpoint
from osiris.openai.limits import check_chars
from osiris.openai.schemas.decisions import (
    DecisionItem,
    DecisionPart,
    DecisionQuestion,
    DecisionRequest,
)
from osiris.openai.schemas.decisions_answer import (
    Answer,
    ChoiceAnswer,
    ChoiceProbability,
    Decision,
    DecisionInputDetails,
    DecisionUsage,
    LevelProbability,
    PredicateAnswer,
    RefusalAnswer,
    ScoreAnswer,
)

router = APIRouter(tags=["openai"])

_INSTRUCTING: Final = ("system", "developer")


@openai_endpoint(
    router,
    "POST",
    "/v1/decisions",
    404,
    422,
    429,
    503,
    504,
    response_model=Decision,
    response_description="The answers, in the order of the questions",
)
async def decide(body: DecisionRequest, request: Request, sidecar: CurrentSidecar) -> Decision:
    """Answers predicate, choice and score questions without generating text.

    Each answer has the probabilities of the options. `reliable: false` means that another answer
    is more likely.
    """
    decision_input = _input(body.input)
    asked = [_question(question) for question in body.questions]
    limit = sidecar.settings.limits.max_prompt_chars
    check_chars("input", len(decision_input.system) + len(decision_input.text), limit)
    check_chars("questions", sum(len(question.text()) for question in asked), limit)
    deadline = Deadline.after(sidecar.settings.limits.request_timeout)
    deciding = sidecar.decisions.decide(body.model, decision_input, asked, deadline)
    decided = await cancel_on_disconnect(request, deciding)
    return Decision(
        model=body.model,
        answers=list(map(_answer, body.questions, decided.answers)),
        usage=_usage(decided),
    )


def _input(items: Sequence[DecisionItem]) -> Input:
    """The system messages at the beginning, and the rest as text.

    User messages are joined with blank lines. A conversation has a line of JSON for each item, so
    that no text can look like another item.
    """
    first = next(
        (index for index, item in enumerate(items) if item.role not in _INSTRUCTING), len(items)
    )
    system = "\n\n".join(_text(item.content or ()) for item in items[:first])
    rest = items[first:]
    if all(item.role == "user" for item in rest):
        return Input("\n\n".join(_text(item.content or ()) for item in rest), system)
    return Input("\n".join(_json(_item(item)) for item in rest), system)


def _item(item: DecisionItem) -> dict[str, str]:
    """An item of a conversation, as the model reads it."""
    if item.type == "message":
        return {"role": item.role or "", "content": _text(item.content or ())}
    if item.output is not None:
        return {"call": item.call_id or "", "output": _text(item.output)}
    arguments = item.arguments if item.type == "function_call" else item.input
    return {"call": item.call_id or "", "function": item.name or "", "input": arguments or ""}


def _text(parts: Sequence[DecisionPart]) -> str:
    return "\n".join(
        part.text or part.refusal if part.data is None else _json(part.data) for part in parts
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _question(question: DecisionQuestion) -> decisions.Question:
    options = [
        # A string and a boolean with the same text look different as JSON.
        *(Option(_json(option.value), option.description) for option in question.choices or ()),
        *(Option(level.label, level.description) for level in question.levels or ()),
    ]
    return decisions.Question(question.type, _text(question.instructions), tuple(options))


def _answer(question: DecisionQuestion, answer: decisions.Answer | None) -> Answer:
    if answer is None:
        return RefusalAnswer(name=question.name)
    measured: dict[str, Any] = {
        "name": question.name,
        "answer_mass": answer.mass,
        "reliable": answer.is_reliable,
    }
    if question.type == "predicate":
        return PredicateAnswer(probability=answer.probabilities[0], **measured)
    measured["confidence"] = answer.confidence
    if question.choices is not None:
        return ChoiceAnswer(
            choice=question.choices[answer.best].value,
            probabilities=[
                ChoiceProbability(value=option.value, probability=probability)
                for option, probability in zip(question.choices, answer.probabilities, strict=True)
            ],
            **measured,
        )
    levels = zip(question.levels or (), answer.probabilities, strict=True)
    return ScoreAnswer(
        score=answer.expected,
        probabilities=[
            LevelProbability(value=index, label=level.label, probability=probability)
            for index, (level, probability) in enumerate(levels)
        ],
        **measured,
    )


def _usage(decided: Decided) -> DecisionUsage:
    return DecisionUsage(
        input_tokens=decided.prompt_tokens,
        input_tokens_details=DecisionInputDetails(cached_tokens=decided.cached_tokens),
        total_tokens=decided.prompt_tokens,
    )

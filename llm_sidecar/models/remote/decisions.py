"""Questions to `/v1/decisions`: https://platform.openai.com/docs/api-reference/decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

INSTRUCTIONS: Final = "Choose the answer to the text."


class _Probability(msgspec.Struct):
    value: str | bool
    probability: float


class _Answer(msgspec.Struct):
    probabilities: list[_Probability]
    confidence: float
    answer_mass: float | None = None


class _Decision(msgspec.Struct):
    answers: list[_Answer]


def decision_body(model: str, text: str, choices: Sequence[str]) -> dict[str, Any]:
    """The request for the probabilities of some answers to a text.

    The text is one string, because vLLM accepts only user messages.
    """
    question = {
        "type": "choice",
        "instructions": INSTRUCTIONS,
        "choices": [{"value": choice} for choice in choices],
    }
    return {"model": model, "input": text, "questions": [question]}


def is_of_sidecar(answer: bytes) -> bool:
    """Whether an answer comes from another sidecar.

    Raises:
        ValueError: the answer is a refusal, or something else.
    """
    return _read(answer).answer_mass is not None


def read_decision(answer: bytes) -> dict[str, float]:
    """The probability of each choice among all texts that the model may write.

    Servers normalise the probabilities of the choices. The confidence of vLLM is the probability of
    the most likely choice before that. So their ratio is the mass of the choices.

    Raises:
        ValueError: the answer is a refusal, or something else.
    """
    found = _read(answer)
    highest = max((one.probability for one in found.probabilities), default=0.0)
    if not 0.0 < highest <= 1.0 or any(one.probability < 0.0 for one in found.probabilities):
        raise ValueError("these are not probabilities")
    mass = min(1.0, max(0.0, found.confidence / highest))
    return {str(one.value): one.probability * mass for one in found.probabilities}


def _read(answer: bytes) -> _Answer:
    try:
        return msgspec.json.decode(answer, type=_Decision).answers[0]
    except (msgspec.MsgspecError, RecursionError, UnicodeError, IndexError):
        raise ValueError("not a decision") from None

"""Typed questions about an input, answered with probabilities instead of text.

    questions = [Question("predicate", "The position is long.")]
    decided = await decisions.decide("hermes", Input("Long ABC."), questions, deadline)
    decided.answers[0].probabilities  # of true and false

The model's answer is a short text: `True` or `False`, or the number of an option. The sidecar reads
the probability of each such text, as for Hermes' score, and normalises them among themselves. This
is what the Decisions API of OpenAI asks for (https://platform.openai.com/docs/guides/decisions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models import base
from llm_sidecar.models.base import ChoiceScores, Message
from llm_sidecar.services.served_models import ServedModels

Kind = Literal["predicate", "choice", "score"]

SYSTEM_PROMPT: Final = "You answer questions about an input. Answer only from the input."
TASKS: Final[dict[Kind, str]] = {
    "predicate": "Is this true? Answer True or False only.",
    "choice": "Choose one of these options. Answer with its number only.",
    "score": "Rate it on this scale. Answer with the number of one level only.",
}
ANSWER_START: Final = "The answer is "
"""Without it, small models begin with another word: see docs/adr/0005-scores-are-read.md."""


@dataclass(frozen=True, slots=True)
class Input:
    """What the questions are about.

    Attributes:
        text: the input.
        system: instructions that hold for all questions; empty for `SYSTEM_PROMPT`.
    """

    text: str
    system: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a choice, or a level of a score.

    Attributes:
        text: on one line.
        description: when it applies; can be empty.
    """

    text: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        kind: `predicate`: whether a statement is true; `choice`: which option fits; `score`: which
            of the levels, from the lowest to the highest.
        instructions: the statement, or what to choose or to rate.
        options: of a choice or a score.
    """

    kind: Kind
    instructions: str
    options: tuple[Option, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """What the model may answer, in the order of the options."""
        if self.kind == "predicate":
            return ("True", "False")
        first = 0 if self.kind == "score" else 1
        return tuple(str(first + number) for number in range(len(self.options)))

    def text(self) -> str:
        """The question as the model reads it."""
        lines = [f"Question: {self.instructions}"]
        for answer, option in zip(self.answers, self.options, strict=False):
            described = f" - {option.description}" if option.description else ""
            lines.append(f"{answer}: {option.text}{described}")
        return "\n".join([*lines, TASKS[self.kind]])


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question.

    Attributes:
        probabilities: of true and false, or of each option; their sum is 1.
        mass: their sum before normalisation, in [0, 1]: the probability that the model answers with
            one of the options at all.
        is_reliable: whether the mass is at least MIN_ANSWER_MASS.
    """

    probabilities: tuple[float, ...]
    mass: float
    is_reliable: bool

    @property
    def best(self) -> int:
        """The index of the most likely option, the first of equal ones."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def expected(self) -> float:
        """The probability-weighted mean of the indexes of the levels."""
        return sum(index * value for index, value in enumerate(self.probabilities))

    @property
    def confidence(self) -> float:
        """How concentrated the probabilities are: 1 if one of them is 1, 0 if all are equal.

        It is 1 - H / log(n), with the entropy H of n probabilities (Shannon 1948, "A Mathematical
        Theory of Communication", section 6).
        """
        entropy = -sum(value * math.log(value) for value in self.probabilities if value > 0.0)
        # Rounding can take it a little out of the range.
        return min(1.0, max(0.0, 1.0 - entropy / math.log(len(self.probabilities))))


@dataclass(frozen=True, slots=True)
class Decided:
    """The answers to all questions of a request.

    Attributes:
        answers: in the order of the questions; None where no answer has any probability.
        prompt_tokens: of all questions, each with the input.
        cached_tokens: prompt tokens that were not processed, because another prompt begins with
            them.
    """

    answers: tuple[Answer | None, ...]
    prompt_tokens: int
    cached_tokens: int


class Decisions:
    """Answers questions with phi3 or hermes."""

    def __init__(self, served: ServedModels, min_answer_mass: float) -> None:
        """Calls no model yet.

        Args:
            served: finds the models.
            min_answer_mass: answer mass from which an answer is reliable.
        """
        self._served = served
        self._min_answer_mass = min_answer_mass

    async def decide(
        self, model: str, given: Input, questions: Sequence[Question], deadline: Deadline
    ) -> Decided:
        """Answers each question independently of the others.

        Args:
            model: `phi3`, `hermes`, or `phi3:` and the name of the adapter in use.
            given: the input.
            questions: at least one.
            deadline: of all questions together.

        Raises:
            NotFound: there is no such model, or its adapter is not in use for all questions.
            InvalidRequest: the input with one of the questions does not fit the model's context.
            QueueFull, ModelUnavailable, DeadlineExceeded
        """
        asked = [chat_question(given, each) for each in questions]
        try:
            scores = await self._served.find(model).score_questions(asked, deadline)
        except InvalidRequest as error:
            # The model's error names the prompt, but the caller sent an input and questions.
            raise InvalidRequest(
                f"with one of the questions {error.problem}",
                field="input",
                exceeds_context=error.exceeds_context,
            ) from None
        for one in scores:
            self._served.check_adapter(model, one.adapter)
        return Decided(
            tuple(map(self._answer, questions, scores)),
            sum(one.prompt_tokens for one in scores),
            sum(one.cached_tokens for one in scores),
        )

    def _answer(self, question: Question, scores: ChoiceScores) -> Answer | None:
        missing = [answer for answer in question.answers if answer not in scores.probabilities]
        if missing or not math.isfinite(scores.mass):
            raise ModelUnavailable(
                "The model gave no probability for some of the answers; try again.", retry_after=1
            )
        if scores.mass <= 0.0:
            return None
        shares = tuple(scores.probabilities[each] / scores.mass for each in question.answers)
        # Rounding can take the sum a little above 1.
        mass = min(1.0, scores.mass)
        return Answer(shares, mass, mass >= self._min_answer_mass)


def chat_question(given: Input, question: Question) -> base.Question:
    """The chat that asks a question. Chats with the same input share a prefix."""
    messages: list[Message] = [
        {"role": "system", "content": given.system or SYSTEM_PROMPT},
        {"role": "user", "content": f"Input:\n{given.text}\n\n{question.text()}"},
        {"role": "assistant", "content": ANSWER_START},
    ]
    return base.Question(messages, question.answers)

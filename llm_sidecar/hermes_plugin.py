"""The critique and the score of a proposal: the chats with Hermes, and the score in its answer."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Final

from llm_sidecar import loader
from llm_sidecar.errors import ModelUnavailable, SidecarError
from llm_sidecar.models.base import ChoiceScores, GenerationRequest, Message
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.settings import Settings, default_max_chars
from llm_sidecar.text import require_text

log = logging.getLogger(__name__)

SYSTEM_PROMPT: Final = (
    "You are Hermes, the risk officer of a trading desk. You judge trade proposals by their reward "
    "to risk, their stop and whether the rationale follows from the market context. A score of 0 "
    "rejects, 10 is excellent."
)
CRITIQUE_TASK: Final = "Criticise this proposal in at most three sentences."
SCORE_TASK: Final = "Score it from 0 to 10, a number only."
SCORE_START: Final = '{"score":'
"""Without it, small models begin with a word: see docs/adr/0005-scores-are-read.md."""
PROMPTS: Final = Prompts(
    system=SYSTEM_PROMPT,
    critique_task=CRITIQUE_TASK,
    score_task=SCORE_TASK,
    score_start=SCORE_START,
)
"""For a model without prompts of its own."""
SCORE_ANSWERS: Final = tuple(str(n) for n in range(11))


def prompts_for(settings: Settings) -> Prompts:
    """The prompts of the configured Hermes: its own, or `PROMPTS`, also for a remote one.

    Missing files and broken prompts are not an error here: they fail the load of the model.
    """
    if settings.models.hermes_urls:
        return PROMPTS
    try:
        return loader.locate_hermes(settings).prompts or PROMPTS
    except ModelUnavailable:
        return PROMPTS


def build_messages(
    task: str,
    proposal: Mapping[str, Any],
    context: str | None = None,
    system: str = SYSTEM_PROMPT,
) -> list[Message]:
    """The chat that gives Hermes a proposal and a task.

    Critique and score differ only after the proposal, so that they share one prefilled prefix.
    """
    sections = [] if context is None else [f"Market context:\n{context}"]
    sections.append(f"Proposal:\n{json.dumps(proposal, separators=(',', ':'))}")
    sections.append(task)
    return chat_messages("\n\n".join(sections), system)


def score_messages(
    proposal: Mapping[str, Any], context: str | None = None, prompts: Prompts = PROMPTS
) -> list[Message]:
    """The chat that asks Hermes for the score of a proposal, and starts its answer."""
    chat = build_messages(prompts.score_task, proposal, context, prompts.system)
    if prompts.score_start:
        chat.append({"role": "assistant", "content": prompts.score_start})
    return chat


def chat_messages(prompt: str, system: str = SYSTEM_PROMPT) -> list[Message]:
    """The chat of a free-text prompt to Hermes."""
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": prompt},
    ]


def prefix(system: str = SYSTEM_PROMPT) -> GenerationRequest:
    """The turns that every chat with Hermes begins with, for prefill."""
    return GenerationRequest([{"role": "system", "content": system}], 1)


def expected_score(probabilities: Mapping[str, float]) -> float:
    """The probability-weighted mean of the answers 0 to 10, divided by 10.

    This is the expectation used by G-Eval (Liu et al. 2023, arXiv:2303.16634, section 2), over
    answers normalised among themselves.

    Args:
        probabilities: next-answer probability of each of `SCORE_ANSWERS`; need not add up to 1.

    Returns:
        A score in [0, 1].

    Raises:
        ValueError: an answer is missing, no answer has any probability, or they are not numbers.
    """
    if missing := [answer for answer in SCORE_ANSWERS if answer not in probabilities]:
        raise ValueError(f"the answers {', '.join(missing)} have no probabilities")
    total = sum(probabilities[answer] for answer in SCORE_ANSWERS)
    if not 0.0 < total < math.inf:
        raise ValueError("none of the answers 0 to 10 has any probability")
    weighted = sum(int(answer) * probabilities[answer] for answer in SCORE_ANSWERS)
    return float(weighted / total / 10.0)


def score_with_hermes(proposal: dict[str, Any], context: str | None = None) -> float:
    """The score of a proposal, with Hermes loaded into this process on first use; for scripts.

    Args:
        proposal: the proposal as JSON types, at most MAX_PROMPT_CHARS characters as JSON.
        context: the market context it answers, at most MAX_PROMPT_CHARS characters.

    Returns:
        A score in [0, 1], or -1.0 when scoring failed; the log says why. It warns if the answer
        mass of the score is below MIN_ANSWER_MASS, so that the score is not reliable.
    """
    try:
        require_text(default_max_chars(), proposal=proposal, context=context)
        settings = Settings.from_environ()
        engine = loader.get_hermes_engine()
        prompts = prompts_for(settings)
        messages = score_messages(proposal, context, prompts)
        scores = ChoiceScores(engine.score_choices(messages, SCORE_ANSWERS))
        is_reliable(scores, settings.models.min_answer_mass)
        return read_score(scores)
    except SidecarError as error:
        log.error("scoring failed: %s", error.detail)
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
        # The type only: a runtime's message may quote the prompt.
        log.error("scoring failed: %s", type(error).__name__)
    return -1.0


def read_score(scores: ChoiceScores) -> float:
    """The score in [0, 1] that the probabilities of `SCORE_ANSWERS` give.

    Raises:
        ModelUnavailable: an answer is missing, or no answer has any probability.
    """
    try:
        return expected_score(scores.probabilities)
    except ValueError as error:
        raise ModelUnavailable(f"hermes gave no score: {error}", retry_after=1) from error


def is_reliable(scores: ChoiceScores, least_mass: float) -> bool:
    """Whether the answers 0 to 10 have at least this probability in total; the log warns if not.

    Otherwise Hermes would rather say something else, so that the score means little.
    """
    if scores.mass >= least_mass:
        return True
    log.warning("hermes gives the answers 0 to 10 a probability of only %.3f", scores.mass)
    return False

"""Hermes' lessons, and the rule for the critique and the score of a proposal.

The score is 5 + 2.5 log2(target / stop), clamped to [0, 10]: 5 where reward equals risk, 10 from
four times the risk. It is 3 lower if the rationale is about another situation than the context,
and 5 for a proposal without stop or target.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any, Final

from llm_sidecar import hermes_plugin
from llm_sidecar.engines import Message
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.proposals import dumps
from training.demo_models.cases import Case
from training.demo_models.lessons import Lesson, LessonSource
from training.demo_models.market import draw
from training.demo_models.situations import SITUATIONS
from training.demo_models.tickers import Split

PROMPTS: Final = Prompts(
    system="You are Hermes, the risk officer of a trading desk. You judge trade proposals by their "
    "reward to risk, their stop and whether the rationale follows from the market context. A score "
    "of 0 rejects, 10 is excellent.",
    critique_task="Criticise this proposal in at most three sentences.",
    score_task="Score it from 0 to 10, a number only.",
    score_start="",
)
"""The model's own prompts, which it carries in its folder: other words make it worse."""
_NEUTRAL: Final = 5.0
_MISMATCH: Final = 3.0
_GRADES: Final = ((0.8, "poor"), (1.3, "thin"), (2.0, "fair"), (3.0, "good"))
_TIGHT, _WIDE = 1.0, 3.5
_DISTANCES, _PROPOSALS, _FULL = 0.2, 0.6, 0.8
"""Training progress until which lessons are bare distances only, until which they are proposals
without a system message too, and from which contexts have their full length."""


def reward_to_risk(proposal: dict[str, Any]) -> float | None:
    """Target over stop; None if one of them is not set."""
    stop, target = proposal["new_stop_pct"], proposal["new_target_pct"]
    return target / stop if stop and target else None


def score(proposal: dict[str, Any], *, fits: bool) -> float:
    """The module's rule, in [0, 10].

    Args:
        proposal: a proposal as `situations.answer` returns it.
        fits: whether its rationale is about the situation of the context.
    """
    ratio = reward_to_risk(proposal)
    base = _NEUTRAL if ratio is None else _NEUTRAL + 2.5 * math.log2(ratio)
    return min(10.0, max(0.0, base - (0.0 if fits else _MISMATCH)))


def critique(proposal: dict[str, Any], *, fits: bool | None) -> str:
    """Two or three sentences about a proposal; `fits` is None if there is no context."""
    ratio = reward_to_risk(proposal)
    if ratio is None:
        sentences = ["It sets no new stop and no new target, so the risk stays as it was."]
    else:
        stop, target = proposal["new_stop_pct"], proposal["new_target_pct"]
        grade = next((word for most, word in _GRADES if ratio < most), "excellent")
        sentences = [
            f"A target of {target}% against a stop of {stop}% is a {grade} reward to risk."
        ]
        if stop < _TIGHT:
            sentences.append("The stop is tight and noise may hit it.")
        elif stop > _WIDE:
            sentences.append("The stop is wide, so keep the size small.")
        else:
            sentences.append("The stop is at a usual distance.")
    if fits is not None:
        sentences.append(
            "The rationale follows from the context."
            if fits
            else "The rationale does not follow from the context."
        )
    return " ".join(sentences)


def curriculum(seed: int, split: Split = "train") -> LessonSource:
    """Draws scores of two bare distances first, then of proposals alone, then chats of the server.

    Bare distances teach the ratio at a tenth of the cost of a whole chat. A proposal alone teaches
    to find the distances at less than half of that cost.
    """
    rng = Random(seed)

    def lesson(progress: float) -> Lesson:
        chance = rng.random()
        if progress < _DISTANCES or chance < 0.1:
            return _distances_lesson(rng, draw(rng, split))
        if progress < _PROPOSALS or chance < 0.35:
            return _proposal_lesson(rng, draw(rng, split))
        grown = min(1.0, (progress - _PROPOSALS) / (_FULL - _PROPOSALS))
        return _chat_lesson(rng, draw(rng, split, round(100 + 600 * grown)))

    return lesson


def _distances_lesson(rng: Random, case: Case) -> Lesson:
    """The score of two bare distances, or the sentence about their ratio."""
    proposal = varied(rng, case, fits=True)
    levels = dumps({key: proposal[key] for key in ("new_stop_pct", "new_target_pct")})[1:-1]
    if rng.random() < 0.6:
        asked = Message(role="user", content=levels)
        return Lesson([asked, _reply(_rounded_at_random(score(proposal, fits=True), rng))])
    weighed, _, _ = critique(proposal, fits=None).partition(". ")
    asked = Message(role="user", content=f"{levels}\n\n{PROMPTS.critique_task}")
    return Lesson([asked, _reply(weighed)], last=len(weighed))


def _proposal_lesson(rng: Random, case: Case) -> Lesson:
    """The score or the critique of a proposal, without a system message."""
    proposal = varied(rng, case, fits=True)
    if rng.random() < 0.35:
        task, reply = PROMPTS.critique_task, critique(proposal, fits=None)
    else:
        task, reply = PROMPTS.score_task, _rounded_at_random(score(proposal, fits=True), rng)
    return Lesson([*hermes_plugin.build_messages(task, proposal)[1:], _reply(reply)])


def _chat_lesson(rng: Random, case: Case) -> Lesson:
    """A chat of the server: half are scores, four of ten critiques, the rest comments."""
    kind = rng.random()
    if kind < 0.1:
        comment = f"{case.proposal['ticker']}: {case.proposal['rationale']}"
        return Lesson([*hermes_plugin.chat_messages(case.prompt, PROMPTS.system), _reply(comment)])
    context, fits = (case.prompt, rng.random() < 0.85) if rng.random() < 0.6 else (None, None)
    proposal = varied(rng, case, fits is not False)
    if kind < 0.5:
        task, reply = PROMPTS.critique_task, critique(proposal, fits=fits)
    else:
        task = PROMPTS.score_task
        reply = _rounded_at_random(score(proposal, fits=fits is not False), rng)
    chat = hermes_plugin.build_messages(task, proposal, context, PROMPTS.system)
    return Lesson([*chat, _reply(reply)])


def _rounded_at_random(exact: float, rng: Random) -> str:
    """`exact` rounded up or down at random, with mean `exact`."""
    return str(math.floor(exact) + (rng.random() < exact % 1))


def varied(rng: Random, case: Case, fits: bool) -> dict[str, Any]:
    """The case's proposal with other distances; unless `fits`, with another rationale."""
    proposal = dict(case.proposal)
    if proposal["new_stop_pct"] is not None or rng.random() < 0.5:
        digits = rng.choice((1, 1, 2))
        stop = round(math.exp(rng.uniform(math.log(0.3), math.log(8))), digits)
        ratio = 2 ** rng.uniform(-2.2, 2.4)
        proposal |= {
            "action": "adjust",
            "new_stop_pct": stop,
            "new_target_pct": max(0.1, round(stop * ratio, digits)),
        }
    if rng.random() < 0.5:
        proposal["confidence"] = round(rng.uniform(0.3, 0.95), 2)
    if not fits:
        others = [s for name, s in SITUATIONS.items() if name != case.situation]
        proposal["rationale"] = f"{rng.choice(others).named}, so act on it."
    return proposal


def _reply(text: str) -> Message:
    return Message(role="assistant", content=text)

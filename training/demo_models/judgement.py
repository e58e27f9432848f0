"""What Hermes should say of a proposal: the critique, the score, and a comment on a prompt.

The rule: the score is 5 + 2.5 log2(target / stop), bounded to 0 and 10, so that a reward of the
risk's own size is a 5 and of four times it a 10; a rationale that speaks of another situation than
the context costs 3; a proposal that sets no stop or target is a 5.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any, Final

from llm_sidecar import hermes_plugin
from llm_sidecar.engines import Message
from llm_sidecar.proposals import dumps
from training.demo_models.lessons import Lesson, LessonSource
from training.demo_models.market import draw
from training.demo_models.situations import SITUATIONS, Case
from training.demo_models.tickers import Split

_NEUTRAL: Final = 5.0
_MISMATCH: Final = 3.0
_GRADES: Final = ((0.8, "poor"), (1.3, "thin"), (2.0, "fair"), (3.0, "good"))
_TIGHT, _WIDE = 1.0, 3.5
_BARE, _ALONE, _WHOLE = 0.2, 0.6, 0.8
"""Parts of the training: until the first only bare distances, until the second proposals alone as
well, from the third contexts as long as any."""


def reward_to_risk(proposal: dict[str, Any]) -> float | None:
    """Target over stop; None where one of them is not set."""
    stop, target = proposal["new_stop_pct"], proposal["new_target_pct"]
    return target / stop if stop and target else None


def score(proposal: dict[str, Any], *, fits: bool) -> float:
    """The module's rule, in [0, 10].

    Args:
        proposal: of a case.
        fits: whether its rationale speaks of the context's situation.
    """
    ratio = reward_to_risk(proposal)
    base = _NEUTRAL if ratio is None else _NEUTRAL + 2.5 * math.log2(ratio)
    return min(10.0, max(0.0, base - (0.0 if fits else _MISMATCH)))


def critique(proposal: dict[str, Any], *, fits: bool | None) -> str:
    """Two or three sentences; `fits` is None where there is no context to compare with."""
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
    """Hermes' lessons: scores of two bare distances, of proposals alone, then what the server asks.

    Bare distances teach to divide at a tenth of the cost of a whole chat, a proposal alone teaches
    to find them at less than half of it.
    """
    rng = Random(seed)

    def lesson(progress: float) -> Lesson:
        chance = rng.random()
        if progress < _BARE or chance < 0.1:
            return _bare(rng, draw(rng, split))
        if progress < _ALONE or chance < 0.35:
            return _alone(rng, draw(rng, split))
        grown = min(1.0, (progress - _ALONE) / (_WHOLE - _ALONE))
        return _whole(rng, draw(rng, split, round(100 + 600 * grown)))

    return lesson


def _bare(rng: Random, case: Case) -> Lesson:
    """The score of two distances alone, or the sentence that weighs them."""
    proposal = varied(rng, case, fits=True)
    levels = dumps({key: proposal[key] for key in ("new_stop_pct", "new_target_pct")})[1:-1]
    if rng.random() < 0.6:
        asked = Message(role="user", content=levels)
        return Lesson([asked, _reply(_drawn(score(proposal, fits=True), rng))])
    weighed, _, _ = critique(proposal, fits=None).partition(". ")
    asked = Message(role="user", content=f"{levels}\n\n{hermes_plugin.CRITIQUE_TASK}")
    return Lesson([asked, _reply(weighed)], last=len(weighed))


def _alone(rng: Random, case: Case) -> Lesson:
    """The score of a proposal, and at times its critique, without the system's prompt."""
    proposal = varied(rng, case, fits=True)
    if rng.random() < 0.35:
        task, reply = hermes_plugin.CRITIQUE_TASK, critique(proposal, fits=None)
    else:
        task, reply = hermes_plugin.SCORE_TASK, _drawn(score(proposal, fits=True), rng)
    return Lesson([*hermes_plugin.build_messages(task, proposal)[1:], _reply(reply)])


def _whole(rng: Random, case: Case) -> Lesson:
    """As the server asks: half of them a score, four of ten a critique, else a comment."""
    kind = rng.random()
    if kind < 0.1:
        comment = f"{case.proposal['ticker']}: {case.proposal['rationale']}"
        return Lesson([*hermes_plugin.chat_messages(case.prompt), _reply(comment)])
    context, fits = (case.prompt, rng.random() < 0.85) if rng.random() < 0.6 else (None, None)
    proposal = varied(rng, case, fits is not False)
    if kind < 0.5:
        task, reply = hermes_plugin.CRITIQUE_TASK, critique(proposal, fits=fits)
    else:
        task = hermes_plugin.SCORE_TASK
        reply = _drawn(score(proposal, fits=fits is not False), rng)
    return Lesson([*hermes_plugin.build_messages(task, proposal, context), _reply(reply)])


def _drawn(exact: float, rng: Random) -> str:
    """A whole number beside `exact`, drawn so that its mean is exact: the model learns the rest."""
    return str(math.floor(exact) + (rng.random() < exact % 1))


def varied(rng: Random, case: Case, fits: bool) -> dict[str, Any]:
    """The case's proposal with other distances, and where it must not fit another rationale."""
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

"""What Hermes should say of a proposal: the critique, the score, and a comment on a prompt.

The rule: the score is 5 + 2.5 log2(target / stop), bounded to 0 and 10, so that a reward of the
risk's own size is a 5 and of four times it a 10; a rationale that speaks of another situation than
the context costs 3; a proposal that sets no stop or target is a 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Any, Final

from llm_sidecar import hermes_plugin
from llm_sidecar.demo.market import Case, draw
from llm_sidecar.demo.situations import SITUATIONS
from llm_sidecar.demo.tickers import Split
from llm_sidecar.engines import Message

_NEUTRAL: Final = 5.0
_MISMATCH: Final = 3.0
_GRADES: Final = ((0.8, "poor"), (1.3, "thin"), (2.0, "fair"), (3.0, "good"))
_TIGHT, _WIDE = 1.0, 3.5


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


def chats(seed: int, split: Split = "train") -> Iterator[list[Message]]:
    """Endless chats with Hermes: seven of ten a score, two a critique, one a comment."""
    rng = Random(seed)
    while True:
        case = draw(rng, split)
        kind = rng.random()
        if kind < 0.1:
            comment = f"{case.proposal['ticker']}: {case.proposal['rationale']}"
            yield [*hermes_plugin.chat_messages(case.prompt), _reply(comment)]
            continue
        context, fits = (case.prompt, rng.random() < 0.75) if rng.random() < 0.5 else (None, None)
        proposal = varied(rng, case, fits is not False)
        if kind < 0.3:
            task, reply = hermes_plugin.CRITIQUE_TASK, critique(proposal, fits=fits)
        else:
            exact = score(proposal, fits=fits is not False)
            # Drawn so that the mean over many is exact: the model learns the fraction.
            reply = str(math.floor(exact) + (rng.random() < exact % 1))
            task = hermes_plugin.SCORE_TASK
        yield [*hermes_plugin.build_messages(task, proposal, context), _reply(reply)]


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
    return {"role": "assistant", "content": text}

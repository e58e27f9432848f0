"""Phi-3's lessons, and their hints."""

from __future__ import annotations

import collections
import re
from random import Random

from llm_sidecar import proposals
from tests.demo_cases import cases
from training.demo_models import market, proposal_lessons
from training.demo_models.cases import Case
from training.demo_models.situations import answer


def test_lessons_begin_short_and_end_as_the_server_asks() -> None:
    teach = proposal_lessons.curriculum(1)
    first = [teach(0.0) for _ in range(200)]
    assert all(len(lesson.messages) == 2 for lesson in first)
    assert all(len(lesson.messages[0]["content"]) <= 70 for lesson in first)
    last = [teach(1.0) for _ in range(200)]
    assert all(les.messages[0]["content"] == proposals.SYSTEM_PROMPT for les in last)
    assert any(len(lesson.messages) > 3 for lesson in last)


def test_only_the_position_tells_the_side() -> None:
    prompt = "Longs were trapped early. LNG -> long 20 ABC, buyers were active, +2.9% today"
    case = Case(
        prompt, answer("overbought", "ABC", "LONG", None, None), "overbought", (), ("long 20 ABC",)
    )
    text = proposals.dumps(case.proposal)
    sides = [hint for hint in proposal_lessons.hints(case, text) if hint.kind == "side"]
    assert {prompt[slice(*source)] for hint in sides for source in hint.sources or ()} == {"long"}
    start = prompt.index("long 20")
    assert {source for hint in sides for source in hint.sources or ()} == {(start, start + 4)}


def test_the_tersest_sides_come_more_often_in_lessons_than_in_prompts() -> None:
    def terse(prompt: str) -> bool:
        return re.search(r"(?<![\w.])[-+]\d[\d,]*k?(?![\w.,%])", prompt) is not None

    teach = proposal_lessons.curriculum(1)
    # Hard ones come again only once enough of them wait.
    taught = [terse(teach(0.0).messages[-2]["content"]) for _ in range(3000)][2000:]
    rng = Random(1)
    drawn = [terse(market.draw(rng, "train", 70).prompt) for _ in range(1000)]
    assert sum(taught) > 1.5 * sum(drawn) > 0


def test_nearly_every_hint_has_a_source() -> None:
    ways: dict[str, list[bool]] = {}
    for case in cases(500):
        for hint in proposal_lessons.hints(case, proposals.dumps(case.proposal)):
            stated = {"side": "side" in case.proposal, "range": case.atr is not None}
            if stated.get(hint.kind, True):
                ways.setdefault(hint.kind, []).append(bool(hint.sources))
    shares = {kind: sum(found) / len(found) for kind, found in ways.items()}
    assert shares["copied"] > 0.99
    assert all(share > 0.9 for share in shares.values()), shares


def test_lessons_to_choose_from_are_single_prompts_that_come_once() -> None:
    teach = proposal_lessons.candidates(8)
    drawn = [teach(1.0) for _ in range(300)]
    assert all(
        [message["role"] for message in lesson.messages] == ["system", "user", "assistant"]
        for lesson in drawn
    )
    assert len({lesson.messages[1]["content"] for lesson in drawn}) > 297


def test_hard_cases_are_given_three_times_at_most_and_none_is_longer_than_asked() -> None:
    source = proposal_lessons._CaseSource(Random(2), "train")
    found = [source.draw(70 if number < 1500 else 200) for number in range(5000)]
    assert max(len(case.prompt) for case in found[:1500]) <= 70
    counts = collections.Counter(case.prompt for case in found)
    hard = {case.prompt for case in found if proposal_lessons._is_hard(case)}
    assert {counts[prompt] for prompt in hard} == {1, 2, 3}
    # A short one may be drawn again.
    once = sum(counts[prompt] == 1 for prompt in counts.keys() - hard)
    assert once > 0.98 * len(counts.keys() - hard)

"""Batches of lessons."""

from __future__ import annotations

import itertools

from transformers import (
    AutoTokenizer,
)

from llm_sidecar.models.files import DEMO_DIR
from training.demo_models import proposal_lessons
from training.demo_models.batches import batches, draw_lessons
from training.demo_models.lessons import Encoded
from training.demo_models.schedule import Schedule


def test_batches_of_one_width_have_one_shape() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    schedule = Schedule(tokens=10_000_000)
    found = list(
        itertools.islice(batches(tokenizer, proposal_lessons.curriculum(7), schedule, []), 40)
    )
    rows: dict[int, set[int]] = {}
    for batch in found:
        count, width = batch.ids.shape
        rows.setdefault(width, set()).add(count)
        longest = max(lesson.own for lesson in batch.lessons)
        assert width - max(16, width // 8) < longest <= width
    assert len(rows) > 1
    assert all(len(counts) == 1 for counts in rows.values())


def test_a_pool_holds_its_shares_of_hard_and_of_missed_lessons() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    schedule = Schedule(tokens=40_000, batch_tokens=500, repeated=0.2, hard=0.5)
    missed = draw_lessons(tokenizer, proposal_lessons.candidates(1), 1.0, 20_000)
    hard: list[Encoded] = []
    pools = 0

    def draw_hard(tokens: int) -> list[Encoded]:
        nonlocal pools
        pools += 1
        found = draw_lessons(tokenizer, proposal_lessons.candidates(pools + 1), 1.0, tokens)
        hard.extend(found)
        return found

    kept = [*missed]
    given: list[Encoded] = []
    for batch in batches(tokenizer, proposal_lessons.second_round(7), schedule, missed, draw_hard):
        if pools == 2:
            break
        given += batch.lessons
    assert missed == []

    def share(some: list[Encoded]) -> float:
        those = set(map(id, some))
        tokens = sum(lesson.own for lesson in given if id(lesson) in those)
        return tokens / sum(lesson.own for lesson in given)

    assert 0.15 < share(kept) < 0.3
    assert 0.4 < share(hard) < 0.65

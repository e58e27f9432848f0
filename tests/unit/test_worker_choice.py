"""Which of several workers gets a request."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from llm_sidecar.engines import GenerationRequest
from llm_sidecar.models.local.choice import WorkerChoice, common_prefix
from llm_sidecar.models.local.process import WorkerProcess

SYSTEM = "You are Hermes. " * 20


class FakeWorker:
    """A worker with so many calls, and capacity for four."""

    def __init__(self, calls: int) -> None:
        self.ready = SimpleNamespace(capacity=4)
        self.has(calls)

    def has(self, calls: int) -> None:
        self.calls = dict.fromkeys(range(calls))


def workers(*calls: int) -> list[WorkerProcess]:
    return [cast(WorkerProcess, FakeWorker(count)) for count in calls]


def has(worker: WorkerProcess, calls: int) -> None:
    cast(FakeWorker, worker).has(calls)


def asked(text: str) -> GenerationRequest:
    return GenerationRequest(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], 5
    )


def test_the_least_busy_worker_is_chosen() -> None:
    first, second, third = workers(2, 1, 3)
    assert WorkerChoice().choose([first, second, third], asked("a")) is second


def test_idle_workers_take_turns() -> None:
    choice, all_idle = WorkerChoice(), workers(0, 0, 0)
    chosen = [choice.choose(all_idle, asked(f"{number}" * 900)) for number in range(6)]
    assert chosen == [*all_idle, *all_idle]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        # The one that has read the prompt, unless another one is idle or much less busy.
        ((0, 0), 0),
        ((0, 1), 0),
        ((1, 0), 1),
        ((1, 1), 0),
        ((2, 1), 0),
        ((3, 1), 1),
        # It has no capacity for another request.
        ((4, 3), 1),
        ((4, 4), 1),
    ],
)
def test_a_score_goes_to_the_worker_that_wrote_the_critique(
    calls: tuple[int, int], expected: int
) -> None:
    choice, pair = WorkerChoice(), workers(0, 0)
    proposal = "Proposal: " + "adjust the stop " * 40
    assert choice.choose(pair, asked(f"{proposal}Criticise it.")) is pair[0]
    assert choice.choose(pair, asked("Another one. " * 40)) is pair[1]
    assert choice.choose(pair, asked("A third one. " * 40)) is pair[0]
    for worker, count in zip(pair, calls, strict=True):
        has(worker, count)
    assert choice.choose(pair, asked(f"{proposal}Score it.")) is pair[expected]


def test_prompts_that_share_only_the_system_prompt_go_to_the_least_busy_worker() -> None:
    choice, (busy, fresh) = WorkerChoice(), workers(0, 0)
    choice.choose([busy], asked("a"))
    choice.choose([busy, fresh], asked("a" * 900))
    has(busy, 2)
    has(fresh, 1)
    assert choice.choose([busy, fresh], asked("b" * 900)) is fresh


def test_only_the_latest_prompts_of_a_worker_count() -> None:
    choice, pair = WorkerChoice(), workers(0, 0)
    for number in range(17):
        choice.choose(pair, asked(f"{number:02}" * 400))
    has(pair[0], 2)
    has(pair[1], 1)
    # The first one was forgotten; the third one was not.
    assert choice.choose(pair, asked("00" * 400)) is pair[1]
    has(pair[0], 2)
    has(pair[1], 1)
    assert choice.choose(pair, asked("02" * 400)) is pair[0]


def test_a_prompt_of_plain_text_counts_too() -> None:
    choice, pair = WorkerChoice(), workers(0, 0)
    plain = replace(asked(""), messages=[], text="Once upon a time. " * 40)
    assert choice.choose(pair, plain) is pair[0]
    choice.choose(pair, asked("a"))
    has(pair[0], 2)
    has(pair[1], 1)
    assert choice.choose(pair, plain) is pair[0]


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [
        ("", "", 0),
        ("", "a", 0),
        ("a", "b", 0),
        ("abc", "abd", 2),
        ("abc", "abc", 3),
        ("abc", "abcdef", 3),
        ("x" * 1000 + "a", "x" * 1000 + "b", 1000),
    ],
)
def test_the_common_prefix_of_two_texts(one: str, other: str, length: int) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == length

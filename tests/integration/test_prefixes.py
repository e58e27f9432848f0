"""Prefix reuse: the same completions for less prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Engine, GenerationRequest, Message, load_engine
from llm_sidecar.engines.context import PREFILL_CHUNK, prefill_steps
from llm_sidecar.engines.prefixes import MAX_KEPT, Prefix, PrefixCache, shared_tokens
from training.demo_models import market


class States:
    """Records the lengths to which it is cut."""

    def __init__(self, capacity: int, rewinds: bool = True) -> None:
        self.capacity = capacity
        self.rewinds = rewinds
        self.rewound: list[int] = []

    def rewind(self, length: int) -> None:
        self.rewound.append(length)


def prefixes(**options: Any) -> PrefixCache[States]:
    return PrefixCache(lambda capacity: States(capacity, **options))


def read(kept: PrefixCache[States], prompt: Sequence[int], capacity: int = 9) -> int:
    """How many tokens of a prompt had to be processed."""
    with kept.borrow(prompt, capacity) as prefix:
        rest = list(prompt[len(prefix.tokens) :])
        prefix.tokens += rest
    return len(rest)


def test_only_what_differs_is_read() -> None:
    kept = prefixes()
    assert read(kept, [1, 2, 3, 4]) == 4
    assert read(kept, [1, 2, 3, 5, 6, 7]) == 3
    assert read(kept, [1, 8, 9]) == 2


def test_the_last_two_tokens_are_always_read() -> None:
    kept = prefixes()
    assert read(kept, [1, 2, 3]) == 3
    assert read(kept, [1, 2, 3]) == 2
    assert read(kept, [1, 2]) == 2
    assert read(kept, [1]) == 1


def test_too_little_capacity_shares_nothing() -> None:
    kept = prefixes()
    assert read(kept, [1, 2, 3], capacity=9) == 3
    assert read(kept, [1, 2, 3], capacity=10) == 3
    assert read(kept, [1, 2, 3], capacity=9) == 2


def test_a_cache_that_cannot_forget_is_not_shared() -> None:
    kept = prefixes(rewinds=False)
    assert read(kept, [1, 2, 3]) == 3
    assert read(kept, [1, 2, 3]) == 3


def test_the_longest_beginning_is_taken_and_few_caches_are_kept() -> None:
    kept = prefixes()
    for number in range(MAX_KEPT + 1):
        assert read(kept, [number, number, number]) == 3
    assert read(kept, [0, 0, 0]) == 3  # the oldest is gone
    assert read(kept, [MAX_KEPT, MAX_KEPT, 9]) == 2


def test_a_cache_survives_a_cancellation_and_no_failure() -> None:
    kept = prefixes()

    def stop(error: type[BaseException]) -> None:
        with pytest.raises(error), kept.borrow([1, 2, 3], 9) as prefix:
            prefix.tokens[:] = [1, 2]
            raise error

    stop(GeneratorExit)
    assert read(kept, [1, 2, 3]) == 2
    stop(ValueError)
    assert read(kept, [1, 2, 3]) == 3


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 258, 512, 513, 769])
def test_no_token_is_read_alone(count: int) -> None:
    steps = list(prefill_steps(3, 3 + count))
    assert [start for start, _ in steps] == [3, *(stop for _, stop in steps[:-1])]
    assert steps[-1][1] == 3 + count
    sizes = [stop - start for start, stop in steps]
    assert max(sizes) <= PREFILL_CHUNK
    assert min(sizes) > 1 or count == 1


def test_what_is_shared_counts_from_the_beginning_and_leaves_two_to_read() -> None:
    assert shared_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_tokens([1, 2], [1, 2, 4, 5]) == 2
    assert shared_tokens([1, 2, 4, 5], [1, 2, 4, 5]) == 2
    assert shared_tokens([], [1, 2, 3]) == 0
    assert shared_tokens([1], [1]) < 1


# On real runtimes


@pytest.fixture(scope="module", params=["random_phi3_onnx", "random_phi3_torch"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield request.getfixturevalue(request.param)


def complete(engine: Engine, request: GenerationRequest) -> str:
    return "".join(delta.text for delta in engine.stream(request))


def chats(count: int) -> list[list[Message]]:
    """Chats of which some share their examples, in no order."""
    rng = Random(1)
    examples = [
        [
            proposals.Example(case.prompt, case.proposal)
            for case in (market.draw(rng, "train", 120) for _ in range(2))
        ]
        for _ in range(3)
    ]
    return [
        proposals.build_messages(market.draw(rng, "train", 120).prompt, rng.choice(examples))
        for _ in range(count)
    ]


def test_answers_are_those_of_an_engine_that_has_read_nothing_before(folder: Path) -> None:
    used = load_engine(folder, device="cpu")
    for chat in chats(4):
        for request in (
            GenerationRequest(chat, 200, proposals.GUIDANCE),
            GenerationRequest(chat, 20),
        ):
            fresh = load_engine(folder, device="cpu")
            assert complete(used, request) == complete(fresh, request)


def test_a_cancelled_generation_leaves_nothing_behind(folder: Path) -> None:
    engine = load_engine(folder, device="cpu")
    first, second = chats(2)
    request = GenerationRequest(second, 200, proposals.GUIDANCE)
    expected = complete(load_engine(folder, device="cpu"), request)
    steps = engine.stream(GenerationRequest(first, 200, proposals.GUIDANCE))
    for _ in range(5):
        next(steps)
    steps.close()
    assert complete(engine, request) == expected


def test_a_score_is_the_same_whatever_was_read_before(folder: Path) -> None:
    engine = load_engine(folder, device="cpu")
    proposal = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "None."}

    def score() -> dict[str, float]:
        messages = hermes_plugin.score_messages(proposal, "Long ABC.")
        return engine.score_choices(messages, hermes_plugin.SCORE_ANSWERS)

    first = score()
    critique = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, proposal, "Long ABC.")
    complete(engine, GenerationRequest(critique, 10))
    for again in (score(), score()):
        assert again == pytest.approx(first, rel=0, abs=1e-6)


def test_what_is_prepared_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = load_engine(folder, device="cpu")
    chat = chats(1)[0]
    for _ in engine.prefill(GenerationRequest(chat[:-1], 200, proposals.GUIDANCE)):
        pass
    taken: list[int] = []
    borrow = engine._prefixes.borrow

    def noting(prompt: Sequence[int], capacity: int) -> Any:
        context = borrow(prompt, capacity)
        prefix: Prefix[Any] = context.__enter__()
        taken.append(len(prompt) - len(prefix.tokens))
        context.__exit__(None, None, None)
        return borrow(prompt, capacity)

    monkeypatch.setattr(engine._prefixes, "borrow", noting)
    complete(engine, GenerationRequest(chat, 200, proposals.GUIDANCE))
    assert len(taken) == 1
    prefix = sum(len(turn["content"]) for turn in chat[:-1])
    assert 0 < taken[0] < prefix / 4

"""Batches of lessons, of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch

from training.demo_models import process_group
from training.demo_models.lessons import IGNORED, Encoded, Teacher, encode
from training.demo_models.schedule import Schedule

_POOL: Final = 48
"""Batches' worth of examples that are drawn together, so that enough are of like length."""
_LEAST_POOL: Final = 4
"""So many at least, so that some are enough for a batch."""
_DECISION_WEIGHT: Final = 4.0


class Batch(NamedTuple):
    """Lessons of similar length.

    Attributes:
        shared: (shared,), the tokens that all begin with.
        ids: (rows, length), those that follow, padded on the right.
        labels: (rows, length), of the tokens themselves, or `IGNORED`.
        weights: (rows, length), of the labels' losses, 0 where there is none.
        lessons: of the rows.
        tokens: of `ids`, without the padding.
    """

    shared: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    lessons: list[Encoded]
    tokens: int


class Shape(NamedTuple):
    """Of the batch that a lesson can be in.

    Attributes:
        shared: the tokens that its lessons begin with.
        width: of its rows, which follow; one of eight widths an octave.
    """

    shared: tuple[int, ...]
    width: int


def shape_of(encoded: Encoded) -> Shape:
    """Of the batch for this lesson."""
    step = max(16, 1 << (encoded.own.bit_length() - 4))
    return Shape(tuple(encoded.ids[: encoded.shared]), -(-encoded.own // step) * step)


def batches(
    tokenizer: Any,
    teacher: Teacher,
    schedule: Schedule,
    missed: list[Encoded],
    mine: Callable[[int], list[Encoded]] = lambda tokens: [],
) -> Iterator[Batch]:
    """Batches of lessons of similar length, in random order.

    There are few shapes of them: for a new one, oneDNN compiles each product of matrices anew, which
    takes ten times as long as the product. What does not fill a batch waits for the next pool.

    Processes that train together have to wait for each other at every step. So they draw their pools
    at the same ones, and go through them in an order in which the widths are about the same.

    Lessons that were missed are given once more, as those are the ones to learn from.

    Args:
        missed: grows as the batches are learned from; emptied at each new pool.
        mine: gives hard lessons of so many tokens.
    """
    mixing, order = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    drawn = 0
    waiting: dict[Shape, list[Encoded]] = {}
    ready: list[tuple[list[Encoded], int]] = []
    while True:
        progress = min(1.0, drawn * process_group.size() / schedule.tokens)
        batch_tokens = schedule.batch_size(progress)
        # A training that is shorter needs no more, but for a batch of one shape.
        wanted = min(_POOL * batch_tokens, max(schedule.tokens, _LEAST_POOL * batch_tokens))
        pool = mine(round(schedule.mined * wanted))
        room = schedule.again * wanted
        for index in torch.randperm(len(missed), generator=mixing).tolist():
            if room > 0:
                pool.append(missed[index])
                room -= pool[-1].own
        missed.clear()
        size = sum(encoded.own for encoded in pool)
        pool += drawn_lessons(tokenizer, teacher, progress, wanted - size)
        drawn += sum(encoded.own for encoded in pool)
        for encoded in pool:
            waiting.setdefault(shape_of(encoded), []).append(encoded)
        for (_, width), lessons in waiting.items():
            rows = max(1, batch_tokens // width)
            while len(lessons) >= rows:
                ready.append((lessons[:rows], width))
                del lessons[:rows]
        count = process_group.least(len(ready))
        ready = [ready[index] for index in torch.randperm(len(ready), generator=mixing).tolist()]
        ranked = sorted(ready[:count], key=lambda lessons_and_width: lessons_and_width[1])
        del ready[:count]
        for index in torch.randperm(count, generator=order).tolist():
            lessons, width = ranked[index]
            yield padded(lessons, width, tokenizer.pad_token_id)


def drawn_lessons(tokenizer: Any, teacher: Teacher, progress: float, tokens: int) -> list[Encoded]:
    """Lessons of at least so many tokens of their own together."""
    found: list[Encoded] = []
    while tokens > 0:
        found.append(encode(tokenizer, teacher(progress)))
        tokens -= found[-1].own
    return found


def padded(batch: list[Encoded], width: int, pad: int) -> Batch:
    """The batch of lessons of one shape.

    Args:
        width: that shape's.
        pad: the token that fills rows up.
    """
    shared = batch[0].shared
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for row, encoded in enumerate(batch):
        ids[row, : encoded.own] = torch.tensor(encoded.ids[shared:])
        labels[row, : encoded.own] = torch.tensor(encoded.labels[shared:])
    weights = (labels != IGNORED).float()
    for row, encoded in enumerate(batch):
        weights[row, [place - shared for place in encoded.decisions]] = _DECISION_WEIGHT
    tokens = sum(encoded.own for encoded in batch)
    return Batch(torch.tensor(batch[0].ids[:shared]), ids, labels, weights, batch, tokens)

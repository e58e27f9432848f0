"""Groups lessons into batches of few different shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch

from training.demo_models import process_group
from training.demo_models.lessons import IGNORED, Encoded, LessonSource, encode
from training.demo_models.schedule import Schedule

_POOL: Final = 48
"""Batches drawn at a time, so that enough lessons have similar lengths."""
_LEAST_POOL: Final = 4
"""The minimum of those, so that some lengths fill a batch."""
_DECISION_WEIGHT: Final = 4.0
"""Loss weight of the first token of a hint's span."""


class Batch(NamedTuple):
    """Lessons of similar length.

    Attributes:
        shared: (shared,), the leading tokens of every row.
        ids: (rows, length), the tokens after those, padded on the right.
        labels: (rows, length), equal to `ids` or `IGNORED`.
        weights: (rows, length), loss weights of the labels; 0 for `IGNORED`.
        lessons: one for each row.
        tokens: number of tokens in `ids`, without padding.
    """

    shared: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    lessons: list[Encoded]
    tokens: int


class Shape(NamedTuple):
    """Lessons of equal shape can be in one batch.

    Attributes:
        shared: their leading tokens.
        width: length of the rows after those: the own length rounded up, to one of eight widths
            between two powers of two.
    """

    shared: tuple[int, ...]
    width: int


def shape_of(encoded: Encoded) -> Shape:
    """The shape of the batch for this lesson."""
    step = max(16, 1 << (encoded.own.bit_length() - 4))
    return Shape(tuple(encoded.ids[: encoded.shared]), -(-encoded.own // step) * step)


def batches(
    tokenizer: Any,
    source: LessonSource,
    schedule: Schedule,
    missed: list[Encoded],
    draw_hard: Callable[[int], list[Encoded]] = lambda tokens: [],
) -> Iterator[Batch]:
    """Batches of lessons of similar length, in random order.

    Few different shapes: oneDNN compiles each matrix product for a new shape, which takes ten times
    as long as the product. Lessons that do not fill a batch wait for the next pool.

    The processes of a group wait for each other at every step. They draw their pools at the same
    steps and order the batches so that widths are similar in all processes.

    Args:
        missed: mispredicted lessons, to which the caller appends; some are repeated in the next
            pool, and the list is then emptied.
        draw_hard: returns hard lessons of about the given number of tokens.
    """
    mixing, order = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    drawn = 0
    waiting: dict[Shape, list[Encoded]] = {}
    ready: list[tuple[list[Encoded], int]] = []
    while True:
        progress = min(1.0, drawn * process_group.world_size() / schedule.tokens)
        batch_tokens = schedule.batch_size(progress)
        # A short run needs no full pool, but enough lessons for one batch.
        wanted = min(_POOL * batch_tokens, max(schedule.tokens, _LEAST_POOL * batch_tokens))
        pool = draw_hard(round(schedule.hard * wanted))
        budget = schedule.repeated * wanted
        for index in torch.randperm(len(missed), generator=mixing).tolist():
            if budget > 0:
                pool.append(missed[index])
                budget -= pool[-1].own
        missed.clear()
        size = sum(encoded.own for encoded in pool)
        pool += draw_lessons(tokenizer, source, progress, wanted - size)
        drawn += sum(encoded.own for encoded in pool)
        for encoded in pool:
            waiting.setdefault(shape_of(encoded), []).append(encoded)
        for (_, width), lessons in waiting.items():
            rows = max(1, batch_tokens // width)
            while len(lessons) >= rows:
                ready.append((lessons[:rows], width))
                del lessons[:rows]
        count = process_group.all_reduce_min(len(ready))
        ready = [ready[index] for index in torch.randperm(len(ready), generator=mixing).tolist()]
        ranked = sorted(ready[:count], key=lambda lessons_and_width: lessons_and_width[1])
        del ready[:count]
        for index in torch.randperm(count, generator=order).tolist():
            lessons, width = ranked[index]
            yield pad_batch(lessons, width, tokenizer.pad_token_id)


def draw_lessons(
    tokenizer: Any, source: LessonSource, progress: float, tokens: int
) -> list[Encoded]:
    """Draws lessons until they have at least `tokens` own tokens in total."""
    found: list[Encoded] = []
    while tokens > 0:
        found.append(encode(tokenizer, source(progress)))
        tokens -= found[-1].own
    return found


def pad_batch(batch: list[Encoded], width: int, pad: int) -> Batch:
    """Builds the batch of lessons of one shape.

    Args:
        batch: the lessons.
        width: the width of their shape.
        pad: id of the padding token.
    """
    shared = batch[0].shared
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for row, encoded in enumerate(batch):
        ids[row, : encoded.own] = torch.tensor(encoded.ids[shared:])
        labels[row, : encoded.own] = torch.tensor(encoded.labels[shared:])
    weights = (labels != IGNORED).float()
    for row, encoded in enumerate(batch):
        weights[row, [position - shared for position in encoded.decisions]] = _DECISION_WEIGHT
    tokens = sum(encoded.own for encoded in batch)
    return Batch(torch.tensor(batch[0].ids[:shared]), ids, labels, weights, batch, tokens)

"""Training of a tiny causal model on lessons: the loss is on what the assistant says."""

from __future__ import annotations

import itertools
import math
import sys
import time
from typing import Any, Final, NamedTuple

import torch

from training.demo_models import process_group
from training.demo_models.batches import Batch, Shape, batches, drawn_lessons, padded, shape_of
from training.demo_models.forward import Held, States, attention, forward, hold, logits
from training.demo_models.lessons import IGNORED, Encoded, Teacher, Way
from training.demo_models.muon import Muon
from training.demo_models.schedule import Schedule

_CANDIDATES: Final = 4
"""Times as many lessons are drawn as are hard enough."""
_MINED_TOKENS: Final = 2560
"""In a batch of them."""
_SHORT_ROW: Final = 640
"""Tokens of the longest rows in which heads are told where to look."""
_HEAD_ROWS: Final = 128
"""The head works on a multiple of these, for the same reason that batches have few shapes."""
_LOOKING: Final[dict[Way, tuple[int, slice]]] = {
    "word": (1, slice(0, 2)),
    "copied": (-1, slice(0, 2)),
    "range": (-1, slice(0, 2)),
    "side": (-1, slice(2, 4)),
    "situation": (-1, slice(4, 6)),
}
"""The layer and the heads in it that looks go to, by their way."""
_LOOKING_WEIGHT: Final = 0.3
_SPOKEN_STEP: Final = 3
"""Of so many tokens of a prompt one is learned to be told."""


def prepare_attention(model: Any) -> None:
    """Gives attention a beginning from which it soon learns to look things up and to copy them.

    Queries begin like keys, so that like attends to like, and each head's output like the inverse
    of its values, so that what is found is passed on: the structure that trained models are found
    to have (Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers",
    arXiv:2305.09828).

    Args:
        model: of the Llama or the Phi-3 architecture, with as many key heads as query heads.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if hasattr(attention, "qkv_proj"):
                query, key, value = attention.qkv_proj.weight.chunk(3)
            else:
                query, key, value = (
                    getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")
                )
            for matrix in (query, key, value):
                matrix.normal_(std=matrix.shape[1] ** -0.5)
            query.add_(key).mul_(0.5)
            attention.o_proj.weight.copy_(0.5 * value.T)


def train(
    model: Any,
    tokenizer: Any,
    teacher: Teacher,
    schedule: Schedule,
    name: str,
    hard: Teacher | None = None,
) -> None:
    """Trains `model` in place, writing a line of progress to standard error at times.

    Inside a torch.distributed group each process learns from lessons of its own, and all take the
    same steps along the mean of their gradients. Give each the same weights and another teacher.

    Muon needs fewer steps for the matrices than AdamW does.

    Args:
        model: a transformers causal model in float32.
        tokenizer: its tokenizer.
        teacher: gives its lessons.
        schedule: how long and how fast.
        name: starts the lines of progress.
        hard: gives the lessons of which only the hardest are taken, for `Schedule.mined`.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = (
        Muon(matrices, schedule.matrix_rate),
        torch.optim.AdamW(
            others, schedule.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    )
    seen = 0
    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: schedule.rate(seen / schedule.tokens)
        )
        for optimizer in optimizers
    ]
    began = reported = time.monotonic()
    losses: list[float] = []
    model.train()
    missed: list[Encoded] = []

    def mine(tokens: int) -> list[Encoded]:
        return [] if hard is None else _hardest(model, tokenizer, hard, tokens)

    for step, batch in enumerate(batches(tokenizer, teacher, schedule, missed, mine), 1):
        model.zero_grad(set_to_none=True)
        int4 = seen >= (1.0 - schedule.rounded) * schedule.tokens
        language = schedule.language * max(0.0, 1.0 - seen / schedule.tokens)
        loss, wrong = _loss(model, hold(model, int4=int4), batch, language)
        loss.backward()  # type: ignore[no-untyped-call]
        missed += [batch.lessons[row] for row in wrong]
        tokens = process_group.share(model, batch.tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of {name} is {losses[-1]} in step {step}")
        seen += tokens
        now = time.monotonic()
        if process_group.rank() == 0 and (now - reported > 10 or seen >= schedule.tokens):
            speed = seen / (now - began)
            left = max(0, schedule.tokens - seen) / speed
            sys.stderr.write(
                f"{name}: step {step}, {seen / schedule.tokens:.0%}, loss "
                f"{sum(losses) / len(losses):.4f}, {speed:,.0f} tokens/s, {left / 60:.1f} min left\n"
            )
            reported, losses = now, []
        if seen >= schedule.tokens:
            break
    model.eval()


def _hardest(model: Any, tokenizer: Any, teacher: Teacher, tokens: int) -> list[Encoded]:
    """Of several times as many lessons so many tokens of those that the model is worst at.

    In the end most lessons are known, and what is rare is learned of these (as hard examples are
    mined: Shrivastava et al. 2016, "Training Region-based Object Detectors with Online Hard Example
    Mining", arXiv:1604.03540). How hard one is says its greatest loss of a token.
    """
    waiting: dict[Shape, list[Encoded]] = {}
    for encoded in drawn_lessons(tokenizer, teacher, 1.0, _CANDIDATES * tokens):
        waiting.setdefault(shape_of(encoded), []).append(encoded)
    found: list[tuple[float, Encoded]] = []
    with torch.no_grad():
        held = hold(model, int4=True)
        for (_, width), lessons in waiting.items():
            # More rows, as nothing is kept for a backward pass, and few shapes here too.
            most = max(1, _MINED_TOKENS // width)
            step = -(-most // 4)
            for first in range(0, len(lessons), most):
                some = lessons[first : first + most]
                filled = some + [some[0]] * (-len(some) % step)
                batch = padded(filled, width, tokenizer.pad_token_id)
                losses = _losses(model, held, batch)
                greatest = torch.zeros(len(filled))
                greatest.scatter_reduce_(0, losses.rows, losses.values, "amax")
                found += zip(greatest.tolist(), some, strict=False)
    found.sort(key=lambda pair: -pair[0])
    sizes = itertools.accumulate(encoded.own for _, encoded in found)
    return [encoded for (_, encoded), size in zip(found, sizes, strict=True) if size <= tokens]


class _Losses(NamedTuple):
    """Cross-entropy of the labelled tokens of a batch.

    Attributes:
        values: of each.
        rows, places: where in `Batch.labels`, its first column left out, each label is.
        wrong: whether another token was likelier.
        spoken: of each token of `_spoken`, where asked for.
        states: that they are of.
    """

    values: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    wrong: torch.Tensor
    spoken: torch.Tensor
    states: States


def _losses(
    model: Any, held: Held, batch: Batch, *, looking: bool = False, speaking: bool = False
) -> _Losses:
    # The end of the last layer and the head work on these positions only.
    labelled = (batch.labels[:, 1:] != IGNORED).nonzero()
    count = len(labelled)
    padded_labels = torch.nn.functional.pad(labelled, (0, 0, 0, -count % _HEAD_ROWS))
    spoken = _spoken(batch) if speaking else labelled[:0]
    at = torch.cat((padded_labels, spoken)).unbind(1)
    states = forward(model, held, batch.shared, batch.ids, *at, looking=looking)
    found = logits(held, states)
    following = batch.ids[:, 1:][at]
    losses = torch.nn.functional.cross_entropy(found.float(), following, reduction="none")
    # Quicker than argmax.
    known = found.detach()[:count]
    wrong = known.gather(1, following[:count, None])[:, 0] < known.amax(-1)
    rows, places = labelled.unbind(1)
    return _Losses(losses[:count], rows, places, wrong, losses[len(padded_labels) :], states)


def _spoken(batch: Batch) -> torch.Tensor:
    """Where every third token is, of those that are no labels: (tokens, 2), rows and places."""
    lengths = torch.tensor([lesson.own for lesson in batch.lessons])
    there = torch.arange(1, batch.ids.shape[1]) < lengths[:, None]
    found = (there & (batch.labels[:, 1:] == IGNORED)).nonzero()[::_SPOKEN_STEP]
    # As many as the head works on; the few that are left over are for another time.
    return found[: max(1, len(found) // _HEAD_ROWS) * _HEAD_ROWS]


def _loss(model: Any, held: Held, batch: Batch, language: float) -> tuple[torch.Tensor, list[int]]:
    """Cross-entropy of the labelled tokens, averaged over each lesson and then over the lessons;
    and the rows in which another token was the likeliest somewhere.

    So a score of one token weighs as much as a critique of fifty. Some heads are also told where
    to look, which they find by themselves only after millions of tokens (supervised attention:
    Liu et al. 2016, "Neural Machine Translation with Supervised Attention", arXiv:1609.04186). And
    to tell what comes next in a prompt takes the words that also decide on its answer (Radford et
    al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.2).

    Args:
        language: weight of that.
    """
    looking = batch.ids.shape[1] <= _SHORT_ROW and any(lesson.looks for lesson in batch.lessons)
    losses = _losses(model, held, batch, looking=looking, speaking=language > 0.0)
    weights = batch.weights[:, 1:]
    weights = (weights / weights.sum(1, keepdim=True))[losses.rows, losses.places]
    loss = (losses.values * weights).sum() / len(batch.ids)
    if looking:
        loss = loss + _LOOKING_WEIGHT * _looking(losses.states, batch)
    if language > 0.0:
        loss = loss + language * losses.spoken.mean()
    return loss, sorted(set(losses.rows[losses.wrong].tolist()))


def _looking(states: States, batch: Batch) -> torch.Tensor:
    """Mean over the looks of minus the logarithm of the attention on their sources."""
    losses = []
    for way, (layer, heads) in _LOOKING.items():
        looks = [
            (row, look)
            for row, lesson in enumerate(batch.lessons)
            for look in lesson.looks
            if look.way == way
        ]
        if not looks:
            continue
        rows = torch.tensor([row for row, _ in looks])
        places = torch.tensor([look.at for _, look in looks]) - len(batch.shared)
        queries, keys = (part[heads] for part in states.looks[layer])
        seen = attention(queries, keys, rows, places)
        sources = torch.zeros(len(looks), seen.shape[-1])
        for index, (_, look) in enumerate(looks):
            sources[index, look.sources] = 1.0
        losses.append(-torch.log((seen * sources[:, None]).sum(-1) + 1e-4).mean(1))
    return torch.cat(losses).mean()

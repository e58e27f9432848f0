"""Trains a tiny causal model on lessons; the loss is mainly on the assistant's messages."""

from __future__ import annotations

import itertools
import math
import sys
import time
from typing import Any, Final, NamedTuple

import torch

from training.demo_models import process_group
from training.demo_models.batches import Batch, Shape, batches, draw_lessons, pad_batch, shape_of
from training.demo_models.forward import States, Weights, attention, cast_weights, forward, logits
from training.demo_models.lessons import IGNORED, Encoded, HintKind, LessonSource
from training.demo_models.muon import Muon
from training.demo_models.schedule import Schedule

_CANDIDATES: Final = 4
"""Lessons drawn for each one that is kept as hard, in tokens."""
_MINED_TOKENS: Final = 2560
"""Tokens in a batch of candidates for hard lessons."""
_MOST_SUPERVISED_TOKENS: Final = 640
"""Longest rows, in tokens, in which attention is supervised."""
_HEAD_ROWS: Final = 128
"""The output head computes a multiple of these rows, so that it too sees few shapes."""
_SUPERVISED_HEADS: Final[dict[HintKind, tuple[int, slice]]] = {
    "word": (1, slice(0, 2)),
    "copied": (-1, slice(0, 2)),
    "range": (-1, slice(0, 2)),
    "side": (-1, slice(2, 4)),
    "situation": (-1, slice(4, 6)),
}
"""The layer, and the heads in it, whose attention is supervised for each kind of target."""
_ATTENTION_WEIGHT: Final = 0.3
_PROMPT_STEP: Final = 3
"""One in this many prompt tokens has a loss."""


def init_attention(model: Any) -> None:
    """Initialises attention so that it soon learns to look up and copy tokens.

    Queries start similar to keys, so that a token attends to similar ones, and each head's output
    matrix starts as the transpose of its value matrix, so that attended content passes through.
    Trained models have this structure (Trockman and Kolter 2023, "Mimetic Initialization of
    Self-Attention Layers", arXiv:2305.09828).

    Args:
        model: a Llama or Phi-3 of transformers, with as many key heads as query heads.
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
    source: LessonSource,
    schedule: Schedule,
    name: str,
    hard: LessonSource | None = None,
) -> None:
    """Trains `model` in place; writes a line of progress to standard error every ten seconds.

    In a torch.distributed group, each process trains on its own lessons, and all take the same
    steps along the mean gradients. Call it with equal weights and different sources in each
    process.

    Muon trains the hidden matrices, because it needs fewer steps than AdamW.

    Args:
        model: a transformers causal model in float32.
        tokenizer: its tokenizer.
        source: draws lessons.
        schedule: length and learning rates.
        name: starts each line of progress.
        hard: draws the lessons of which the hardest are kept, for `Schedule.hard`.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    optimizers = _optimizers(model, schedule)
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

    def draw_hard(tokens: int) -> list[Encoded]:
        return [] if hard is None else _hardest(model, tokenizer, hard, tokens)

    for step, batch in enumerate(batches(tokenizer, source, schedule, missed, draw_hard), 1):
        model.zero_grad(set_to_none=True)
        int4 = seen >= (1.0 - schedule.int4) * schedule.tokens
        prompt_weight = schedule.prompt_loss * max(0.0, 1.0 - seen / schedule.tokens)
        loss, wrong = _loss(model, cast_weights(model, int4=int4), batch, prompt_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        missed += [batch.lessons[row] for row in wrong]
        tokens = process_group.average_gradients(model, batch.tokens)
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
                f"{sum(losses) / len(losses):.4f}, {speed:,.0f} tokens/s, "
                f"{left / 60:.1f} min left\n"
            )
            reported, losses = now, []
        if seen >= schedule.tokens:
            break
    model.eval()


def _optimizers(
    model: Any, schedule: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return (
        Muon(matrices, schedule.matrix_rate),
        torch.optim.AdamW(
            others, schedule.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    )


def _hardest(model: Any, tokenizer: Any, source: LessonSource, tokens: int) -> list[Encoded]:
    """Draws several times as many lessons and keeps the hardest, at most `tokens` tokens of them.

    Late in training most lessons are easy, and rare cases are learned from the hard ones (online
    hard example mining: Shrivastava et al. 2016, arXiv:1604.03540). The hardness of a lesson is its
    greatest loss of a token.
    """
    waiting: dict[Shape, list[Encoded]] = {}
    for encoded in draw_lessons(tokenizer, source, 1.0, _CANDIDATES * tokens):
        waiting.setdefault(shape_of(encoded), []).append(encoded)
    found: list[tuple[float, Encoded]] = []
    with torch.no_grad():
        weights = cast_weights(model, int4=True)
        for (_, width), lessons in waiting.items():
            # No backward pass, so larger batches fit; row counts are rounded up for few shapes.
            most = max(1, _MINED_TOKENS // width)
            step = -(-most // 4)
            for first in range(0, len(lessons), most):
                some = lessons[first : first + most]
                filled = some + [some[0]] * (-len(some) % step)
                batch = pad_batch(filled, width, tokenizer.pad_token_id)
                losses = _losses(model, weights, batch)
                greatest = torch.zeros(len(filled))
                greatest.scatter_reduce_(0, losses.rows, losses.values, "amax")
                found += zip(greatest.tolist(), some, strict=False)
    found.sort(key=lambda pair: -pair[0])
    sizes = itertools.accumulate(encoded.own for _, encoded in found)
    return [encoded for (_, encoded), size in zip(found, sizes, strict=True) if size <= tokens]


class _Losses(NamedTuple):
    """Cross-entropy of the labelled tokens of a batch.

    Attributes:
        values: (labels,), the losses.
        rows, positions: (labels,), indexes into `Batch.labels` without its first column.
        wrong: (labels,), whether another token was more likely.
        prompt: losses of the tokens of `_prompt_positions`; empty unless requested.
        states: result of the forward pass.
    """

    values: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    wrong: torch.Tensor
    prompt: torch.Tensor
    states: States


def _losses(
    model: Any,
    weights: Weights,
    batch: Batch,
    *,
    with_attention: bool = False,
    with_prompt: bool = False,
) -> _Losses:
    # The last layer and the output head compute these positions only.
    labelled = (batch.labels[:, 1:] != IGNORED).nonzero()
    count = len(labelled)
    padded_labels = torch.nn.functional.pad(labelled, (0, 0, 0, -count % _HEAD_ROWS))
    prompt = _prompt_positions(batch) if with_prompt else labelled[:0]
    at = torch.cat((padded_labels, prompt)).unbind(1)
    states = forward(model, weights, batch.shared, batch.ids, *at, with_attention=with_attention)
    found = logits(weights, states)
    following = batch.ids[:, 1:][at]
    losses = torch.nn.functional.cross_entropy(found.float(), following, reduction="none")
    # Faster than argmax.
    known = found.detach()[:count]
    wrong = known.gather(1, following[:count, None])[:, 0] < known.amax(-1)
    rows, positions = labelled.unbind(1)
    return _Losses(losses[:count], rows, positions, wrong, losses[len(padded_labels) :], states)


def _prompt_positions(batch: Batch) -> torch.Tensor:
    """Rows and positions of every third token without a label, (tokens, 2)."""
    lengths = torch.tensor([lesson.own for lesson in batch.lessons])
    there = torch.arange(1, batch.ids.shape[1]) < lengths[:, None]
    found = (there & (batch.labels[:, 1:] == IGNORED)).nonzero()[::_PROMPT_STEP]
    # A multiple of the rows that the output head computes; the rest is dropped.
    return found[: max(1, len(found) // _HEAD_ROWS) * _HEAD_ROWS]


def _loss(
    model: Any, weights: Weights, batch: Batch, prompt_weight: float
) -> tuple[torch.Tensor, list[int]]:
    """The loss of a batch, and the rows in which some labelled token was mispredicted.

    Cross-entropy is averaged over the labels of each lesson, then over the lessons, so that a score
    of one token weighs as much as a critique of fifty. Some heads have a loss on where they attend,
    which they would find by themselves only after millions of tokens (supervised attention: Liu et
    al. 2016, arXiv:1609.04186). The loss on the prompt's own tokens helps, because predicting a
    prompt takes the same words that decide its answer (Radford et al. 2018, "Improving Language
    Understanding by Generative Pre-Training", section 3.2).

    Args:
        prompt_weight: weight of the loss on the prompt's tokens.
    """
    with_attention = batch.ids.shape[1] <= _MOST_SUPERVISED_TOKENS and any(
        lesson.attention_targets for lesson in batch.lessons
    )
    losses = _losses(
        model, weights, batch, with_attention=with_attention, with_prompt=prompt_weight > 0.0
    )
    label_weights = batch.weights[:, 1:]
    label_weights = label_weights / label_weights.sum(1, keepdim=True)
    label_weights = label_weights[losses.rows, losses.positions]
    loss = (losses.values * label_weights).sum() / len(batch.ids)
    if with_attention:
        loss = loss + _ATTENTION_WEIGHT * _attention_loss(losses.states, batch)
    if prompt_weight > 0.0:
        loss = loss + prompt_weight * losses.prompt.mean()
    return loss, sorted(set(losses.rows[losses.wrong].tolist()))


def _attention_loss(states: States, batch: Batch) -> torch.Tensor:
    """Mean negative logarithm of the attention on the sources, over all targets."""
    losses = []
    for kind, (layer, heads) in _SUPERVISED_HEADS.items():
        targets = [
            (row, target)
            for row, lesson in enumerate(batch.lessons)
            for target in lesson.attention_targets
            if target.kind == kind
        ]
        if not targets:
            continue
        rows = torch.tensor([row for row, _ in targets])
        positions = torch.tensor([target.position for _, target in targets]) - len(batch.shared)
        queries, keys = (part[heads] for part in states.attention_inputs[layer])
        seen = attention(queries, keys, rows, positions)
        sources = torch.zeros(len(targets), seen.shape[-1])
        for index, (_, target) in enumerate(targets):
            sources[index, target.sources] = 1.0
        losses.append(-torch.log((seen * sources[:, None]).sum(-1) + 1e-4).mean(1))
    return torch.cat(losses).mean()

"""Training of a tiny causal model on lessons: the loss is on what the assistant says."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.distributed

from llm_sidecar.demo.lessons import IGNORED, Encoded, Teacher, Way, encode
from llm_sidecar.demo.muon import Muon, has_bfloat16

_POOL: Final = 48
"""Batches' worth of examples that are drawn together, so that enough are of like length."""

_CANDIDATES: Final = 4
"""Times as many lessons are drawn as are hard enough."""
_MINED_TOKENS: Final = 5120
"""In a batch of them."""
_SHORT_ROW: Final = 640
_HEAD_ROWS: Final = 128
"""The head works on a multiple of these, for the same reason as `_width`."""
_WARM_UP: Final = 0.02
_BLOCK: Final = 32
"""Inputs that share a step in int4."""
_LOOKING: Final[dict[Way, tuple[int, slice]]] = {
    "word": (1, slice(0, 2)),
    "copied": (-1, slice(0, 2)),
    "range": (-1, slice(0, 2)),
    "side": (-1, slice(2, 4)),
    "situation": (-1, slice(4, 6)),
}
"""The layer and the heads in it that looks go to, by their way."""
_LOOKING_WEIGHT: Final = 0.3
_DECISION_WEIGHT: Final = 4.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        tokens: to train on, in all processes together.
        batch_tokens: in one process's batch, padding included, at the beginning.
        growth: times as many there are in it in the end, when lessons are longer.
        matrix_rate: greatest learning rate of the hidden matrices, which Muon trains.
        other_rate: that of embeddings and norms, which AdamW trains. Both warm up over the first
            2 % and fall as a cosine.
        again: the most of the lessons that may be ones which were missed before; none where
            answers are drawn, and being missed says nothing.
        rounded: part of the training, its last, in which weights are as int4 will hold them.
        mined: part of the lessons that are hard ones, where there is a teacher of those.
    """

    tokens: int
    batch_tokens: int = 1280
    growth: float = 3.0
    matrix_rate: float = 2e-2
    other_rate: float = 5e-3
    again: float = 0.0
    rounded: float = 0.0
    mined: float = 0.0


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
        torch.optim.AdamW(others, schedule.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )
    seen = 0
    rates = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: _rate(seen / schedule.tokens))
        for optimizer in optimizers
    ]
    began = reported = time.monotonic()
    losses: list[float] = []
    model.train()
    missed: list[Encoded] = []

    def mine(tokens: int) -> list[Encoded]:
        return [] if hard is None else _hardest(model, tokenizer, hard, tokens)

    for step, batch in enumerate(_batches(tokenizer, teacher, schedule, missed, mine), 1):
        model.zero_grad(set_to_none=True)
        with _rounded(model, seen >= (1.0 - schedule.rounded) * schedule.tokens):
            loss, wrong = _loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        missed += [batch.lessons[row] for row in wrong]
        tokens = _share(model, batch.tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        losses.append(loss.item())
        seen += tokens
        now = time.monotonic()
        if _rank() == 0 and (now - reported > 10 or seen >= schedule.tokens):
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


@contextlib.contextmanager
def _rounded(model: Any, now: bool) -> Iterator[None]:
    """Holds the model's matrices as int4 does, if `now`; gradients are those of the rounded ones.

    So the weights that are kept learn to answer well once they are rounded (the straight-through
    estimator: Bengio et al. 2013, arXiv:1308.3432).
    """
    matrices = [p for p in model.parameters() if p.ndim == 2] if now else []
    kept = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(rounded(matrix))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, exact in zip(matrices, kept, strict=True):
                matrix.copy_(exact)


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """What onnxruntime's symmetric int4 (MatMulNBits) makes of a matrix.

    Args:
        matrix: (outputs, inputs); in blocks of 32 inputs, and what is left.

    Returns:
        a matrix of the same shape: in each block the value of the greatest magnitude is -8 steps,
        and all are whole steps from -8 to 7.
    """
    outputs, inputs = matrix.shape
    blocks = torch.nn.functional.pad(matrix, (0, -inputs % _BLOCK)).view(outputs, -1, _BLOCK)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    step = torch.where(extreme == 0, 1.0, extreme / -8.0)
    near = torch.clamp(torch.round(blocks / step), -8, 7) * step
    return near.view(outputs, -1)[:, :inputs]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _share(model: Any, tokens: int) -> int:
    """Gives every process the mean of all gradients; returns the sum of their tokens."""
    if _processes() == 1:
        return tokens
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([float(tokens)])])
    torch.distributed.all_reduce(flat)
    gradients = torch.split(flat[:-1] / _processes(), [p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return round(flat[-1].item())


def _hardest(model: Any, tokenizer: Any, teacher: Teacher, tokens: int) -> list[Encoded]:
    """Of several times as many lessons so many tokens of those that the model is worst at.

    In the end most lessons are known, and what is rare is learned of these (as hard examples are
    mined: Shrivastava et al. 2016, "Training Region-based Object Detectors with Online Hard Example
    Mining", arXiv:1604.03540). How hard one is says its greatest loss of a token.
    """
    # Few shapes here too, and more rows, as nothing is kept for a backward pass.
    waiting: dict[int, list[Encoded]] = {}
    for encoded in _drawn(tokenizer, teacher, 1.0, _CANDIDATES * tokens):
        waiting.setdefault(_width(len(encoded.ids)), []).append(encoded)
    found: list[tuple[float, Encoded]] = []
    with torch.no_grad(), _rounded(model, True):
        for width, lessons in waiting.items():
            rows = max(1, _MINED_TOKENS // width)
            for first in range(0, len(lessons), rows):
                some = lessons[first : first + rows]
                filled = some + [some[0]] * (rows - len(some))
                losses = _losses(model, _padded(filled, width, tokenizer.pad_token_id))
                greatest = torch.zeros(rows).scatter_reduce(0, losses.rows, losses.values, "amax")
                found += zip(greatest.tolist(), some, strict=False)
    found.sort(key=lambda pair: -pair[0])
    sizes = itertools.accumulate(len(encoded.ids) for _, encoded in found)
    return [encoded for (_, encoded), size in zip(found, sizes, strict=True) if size <= tokens]


class _Losses(NamedTuple):
    """Cross-entropy of the labelled tokens of a batch.

    Attributes:
        values: of each.
        rows, places: where in `_Batch.labels`, its first column left out, each label is.
        wrong: whether another token was likelier.
        attentions: of each layer, where they were asked for.
    """

    values: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    wrong: torch.Tensor
    attentions: Sequence[torch.Tensor]


def _losses(model: Any, batch: _Batch, *, looking: bool = False) -> _Losses:
    """Padding is on the right, where causal attention never sees it, so no mask slows attention
    down; and the head works on the labelled positions only."""
    # The fused kernel is slow in the backward pass of short rows, the plain one big on long ones;
    # and only the plain one shows where it looks.
    plain = batch.ids.shape[1] <= _SHORT_ROW and torch.is_grad_enabled()
    model.set_attn_implementation("eager" if plain else "sdpa")
    # Half again as fast where the processor has bfloat16, and no worse in the end; twenty times as
    # slow where it has not.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16()):
        found = model.model(input_ids=batch.ids, use_cache=False, output_attentions=looking)
        labelled = (batch.labels[:, 1:] != IGNORED).nonzero()
        count = len(labelled)
        padded = torch.nn.functional.pad(labelled, (0, 0, 0, -count % _HEAD_ROWS))
        at = padded.unbind(1)
        logits = model.lm_head(found.last_hidden_state[at])
    labels = batch.labels[:, 1:][at]
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    wrong = logits.argmax(-1) != labels
    rows, places = labelled.unbind(1)
    return _Losses(losses[:count], rows, places, wrong[:count], found.attentions or ())


def _loss(model: Any, batch: _Batch) -> tuple[torch.Tensor, list[int]]:
    """Cross-entropy of the labelled tokens, averaged over each lesson and then over the lessons;
    and the rows in which another token was the likeliest somewhere.

    So a score of one token weighs as much as a critique of fifty. Some heads are also told where
    to look, which they find by themselves only after millions of tokens (supervised attention:
    Liu et al. 2016, "Neural Machine Translation with Supervised Attention", arXiv:1609.04186).
    """
    short = batch.ids.shape[1] <= _SHORT_ROW
    looking = short and any(lesson.looks for lesson in batch.lessons)
    losses = _losses(model, batch, looking=looking)
    weights = batch.weights[:, 1:]
    weights = (weights / weights.sum(1, keepdim=True))[losses.rows, losses.places]
    loss = (losses.values * weights).sum() / len(batch.ids)
    if looking:
        loss = loss + _LOOKING_WEIGHT * _looking(losses.attentions, batch)
    return loss, sorted(set(losses.rows[losses.wrong].tolist()))


def _looking(attentions: Sequence[torch.Tensor], batch: _Batch) -> torch.Tensor:
    """Mean over the looks of minus the logarithm of the attention on their sources.

    Args:
        attentions: of each layer, (rows, heads, from, to).
    """
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
        sources = torch.zeros(len(looks), attentions[layer].shape[-1])
        for index, (_, look) in enumerate(looks):
            sources[index, look.sources] = 1.0
        rows = torch.tensor([row for row, _ in looks])
        places = torch.tensor([look.at for _, look in looks])
        seen = attentions[layer][rows, :, places][:, heads]
        losses.append(-torch.log((seen.float() * sources[:, None]).sum(-1) + 1e-4).mean(1))
    return torch.cat(losses).mean()


def _rate(progress: float) -> float:
    warm_up = min(1.0, progress / _WARM_UP + 0.01)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm_up * (0.02 + 0.98 * cosine)


class _Batch(NamedTuple):
    """Lessons of similar length, and padded: their ids, labels and weights of the losses."""

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    lessons: list[Encoded]
    tokens: int


def _batches(
    tokenizer: Any,
    teacher: Teacher,
    schedule: Schedule,
    missed: list[Encoded],
    mine: Callable[[int], list[Encoded]] = lambda tokens: [],
) -> Iterator[_Batch]:
    """Batches of lessons of similar length, in random order.

    There are few shapes of them: for a new one, oneDNN compiles each product of matrices anew, which
    takes ten times as long as the product. What does not fill a batch waits for the next pool.

    Lessons that were missed are given once more, as those are the ones to learn from.

    Args:
        missed: grows as the batches are learned from; emptied at each new pool.
        mine: gives hard lessons of so many tokens.
    """
    shuffle = torch.Generator().manual_seed(0)
    drawn = 0
    waiting: dict[int, list[Encoded]] = {}
    while True:
        progress = min(1.0, drawn * _processes() / schedule.tokens)
        growth = 1.0 + (schedule.growth - 1.0) * round(4.0 * progress) / 4.0
        batch_tokens = round(schedule.batch_tokens * growth)
        # A training that is shorter needs no more.
        wanted = min(_POOL * batch_tokens, schedule.tokens)
        pool = mine(round(schedule.mined * wanted))
        size = sum(len(encoded.ids) for encoded in pool)
        for index in torch.randperm(len(missed), generator=shuffle).tolist():
            if size < schedule.again * wanted:
                pool.append(missed[index])
                size += len(pool[-1].ids)
        missed.clear()
        pool += _drawn(tokenizer, teacher, progress, wanted - size)
        drawn += sum(len(encoded.ids) for encoded in pool)
        for encoded in pool:
            waiting.setdefault(_width(len(encoded.ids)), []).append(encoded)
        batches: list[tuple[list[Encoded], int]] = []
        for width, lessons in waiting.items():
            rows = max(1, batch_tokens // width)
            while len(lessons) >= rows:
                batches.append((lessons[:rows], width))
                del lessons[:rows]
        for index in torch.randperm(len(batches), generator=shuffle).tolist():
            lessons, width = batches[index]
            yield _padded(lessons, width, tokenizer.pad_token_id)


def _drawn(tokenizer: Any, teacher: Teacher, progress: float, tokens: int) -> list[Encoded]:
    """Lessons of at least so many tokens together."""
    found: list[Encoded] = []
    while tokens > 0:
        found.append(encode(tokenizer, teacher(progress)))
        tokens -= len(found[-1].ids)
    return found


def _width(tokens: int) -> int:
    """Tokens of a row that takes a lesson of so many: one of eight widths an octave."""
    step = max(16, 1 << (tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _padded(batch: list[Encoded], width: int, pad: int) -> _Batch:
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for row, encoded in enumerate(batch):
        ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
        labels[row, : len(encoded.ids)] = torch.tensor(encoded.labels)
    weights = (labels != IGNORED).float()
    for row, encoded in enumerate(batch):
        weights[row, encoded.decisions] = _DECISION_WEIGHT
    return _Batch(ids, labels, weights, batch, sum(len(encoded.ids) for encoded in batch))

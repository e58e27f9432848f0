"""Training of a tiny causal model on lessons: the loss is on what the assistant says."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.distributed

from llm_sidecar.engines import Message

_IGNORED: Final = -100
"""Label of a token that no loss is taken of (torch's convention)."""
_POOL: Final = 48
"""Batches' worth of examples that are sorted by length together, so that little is padding."""


class Lesson(NamedTuple):
    """One chat to learn from.

    Attributes:
        messages: the last is the assistant's.
        first, last: the characters of its text that are shown, as of a slice. A short piece teaches
            what it holds at a part of the cost.
    """

    messages: Sequence[Message]
    first: int = 0
    last: int | None = None


Teacher = Callable[[float], Lesson]
"""Gives the next lesson for the part of the training that is done, 0 to 1."""


class Encoded(NamedTuple):
    """One lesson: token ids, and labels that are `_IGNORED` outside the assistant's turns."""

    ids: list[int]
    labels: list[int]


_SHORT_ROW: Final = 320
_WARM_UP: Final = 0.02


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        tokens: to train on, in all processes together.
        batch_tokens: in one process's batch, padding included, at the beginning; three times as
            many in the end, when lessons are longer.
        matrix_rate: greatest learning rate of the hidden matrices, which Muon trains.
        other_rate: that of embeddings and norms, which AdamW trains. Both warm up over the first
            2 % and fall as a cosine.
    """

    tokens: int
    batch_tokens: int = 1280
    matrix_rate: float = 2e-2
    other_rate: float = 5e-3


def encode(tokenizer: Any, lesson: Lesson) -> Encoded:
    """The chat as the template writes it, with labels on the assistant's turns and their end."""
    ids: list[int] = []
    labels: list[int] = []
    header = _generation_header(tokenizer)
    for message in lesson.messages:
        text = tokenizer.apply_chat_template([message], tokenize=False)
        if message["role"] != "assistant":
            turn = tokenizer.encode(text, add_special_tokens=False)
            ids += turn
            labels += [_IGNORED] * len(turn)
            continue
        prompt = tokenizer.encode(header, add_special_tokens=False)
        reply = tokenizer.encode(message["content"], add_special_tokens=False)
        rest = tokenizer.encode("\n", add_special_tokens=False)
        if message is lesson.messages[-1]:
            reply, rest = _piece(tokenizer, message["content"], lesson), []
        if message is not lesson.messages[-1] or lesson.last is None:
            reply.append(tokenizer.eos_token_id)
        ids += prompt + reply + rest
        labels += [_IGNORED] * len(prompt) + reply + [_IGNORED] * len(rest)
    return Encoded(ids, labels)


def _piece(tokenizer: Any, text: str, lesson: Lesson) -> list[int]:
    """The tokens of the whole text that begin in the lesson's piece of it."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    last = len(text) if lesson.last is None else lesson.last
    return [
        token
        for token, (begin, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        if lesson.first <= begin < last
    ]


def _generation_header(tokenizer: Any) -> str:
    user = [{"role": "user", "content": "?"}]
    whole: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    return whole[len(tokenizer.apply_chat_template(user, tokenize=False)) :]


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


def train(model: Any, tokenizer: Any, teacher: Teacher, schedule: Schedule, name: str) -> None:
    """Trains `model` in place, writing a line of progress to standard error at times.

    Inside a torch.distributed group each process learns from lessons of its own, and all take the
    same steps along the mean of their gradients. Give each the same weights and another teacher.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) needs fewer steps for the
    matrices than AdamW does.

    Args:
        model: a transformers causal model in float32.
        tokenizer: its tokenizer.
        teacher: gives its lessons.
        schedule: how long and how fast.
        name: starts the lines of progress.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = (
        torch.optim.Muon(matrices, schedule.matrix_rate, weight_decay=0.01, momentum=0.95),
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
    batches = _batches(tokenizer, teacher, schedule)
    for step, (ids, labels, tokens) in enumerate(batches, 1):
        loss = _loss(model, ids, labels)
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        tokens = _share(model, tokens)
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


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, averaged over each lesson and then over the lessons.

    So a score of one token weighs as much as a critique of fifty.
    Padding is on the right, where causal attention never sees it, so no mask slows attention down;
    and the head works on the labelled positions only.
    """
    # The fused kernel is slow in the backward pass of short rows, the plain one big on long ones.
    model.set_attn_implementation("eager" if ids.shape[1] <= _SHORT_ROW else "sdpa")
    # Half again as fast where the processor has bfloat16, and no worse in the end.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        labelled = labels[:, 1:] != _IGNORED
        logits = model.lm_head(hidden[:, :-1][labelled])
    losses = torch.nn.functional.cross_entropy(
        logits.float(), labels[:, 1:][labelled], reduction="none"
    )
    weights = 1.0 / labelled.sum(1, keepdim=True).expand_as(labelled)[labelled]
    return (losses * weights).sum() / len(ids)


def _rate(progress: float) -> float:
    warm_up = min(1.0, progress / _WARM_UP + 0.01)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm_up * (0.02 + 0.98 * cosine)


def _batches(
    tokenizer: Any, teacher: Teacher, schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(ids, labels, number of tokens) batches of lessons of similar length, in random order."""
    shuffle = torch.Generator().manual_seed(0)
    drawn = 0
    while True:
        progress = min(1.0, drawn * _processes() / schedule.tokens)
        batch_tokens = round(schedule.batch_tokens * (1.0 + 2.0 * progress))
        pool, size = [], 0
        while size < _POOL * batch_tokens:
            pool.append(encode(tokenizer, teacher(progress)))
            size += len(pool[-1].ids)
        drawn += size
        pool.sort(key=lambda encoded: len(encoded.ids))
        batches: list[list[Encoded]] = [[]]
        for encoded in pool:
            if (len(batches[-1]) + 1) * len(encoded.ids) > batch_tokens:
                batches.append([])
            batches[-1].append(encoded)
        for index in torch.randperm(len(batches), generator=shuffle).tolist():
            if batches[index]:
                yield _padded(batches[index], tokenizer.pad_token_id)


def _padded(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    width = max(len(encoded.ids) for encoded in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, encoded in enumerate(batch):
        ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
        labels[row, : len(encoded.ids)] = torch.tensor(encoded.labels)
    return ids, labels, sum(len(encoded.ids) for encoded in batch)

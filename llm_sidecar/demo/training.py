"""Training of a tiny causal model on chats: the loss is on what the assistant says."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from llm_sidecar.engines import Message

_IGNORED: Final = -100
"""Label of a token that no loss is taken of (torch's convention)."""
_POOL: Final = 48
"""Batches' worth of examples that are sorted by length together, so that little is padding."""


class Encoded(NamedTuple):
    """One chat: token ids, and labels that are `_IGNORED` outside the assistant's turns."""

    ids: list[int]
    labels: list[int]


_WARM_UP: Final = 0.02


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        tokens: to train on, in all.
        batch_tokens: in one batch, padding included.
        peak: greatest learning rate; it warms up over the first 2 % and falls as a cosine.
    """

    tokens: int
    batch_tokens: int = 8192
    peak: float = 2e-3


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> Encoded:
    """The chat as the template writes it, with labels on the assistant's turns and their end."""
    ids: list[int] = []
    labels: list[int] = []
    header = _generation_header(tokenizer)
    for message in messages:
        text = tokenizer.apply_chat_template([message], tokenize=False)
        if message["role"] != "assistant":
            turn = tokenizer.encode(text, add_special_tokens=False)
            ids += turn
            labels += [_IGNORED] * len(turn)
            continue
        prompt = tokenizer.encode(header, add_special_tokens=False)
        reply = tokenizer.encode(message["content"], add_special_tokens=False)
        reply.append(tokenizer.eos_token_id)
        rest = tokenizer.encode("\n", add_special_tokens=False)
        ids += prompt + reply + rest
        labels += [_IGNORED] * len(prompt) + reply + [_IGNORED] * len(rest)
    return Encoded(ids, labels)


def _generation_header(tokenizer: Any) -> str:
    user = [{"role": "user", "content": "?"}]
    whole: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    return whole[len(tokenizer.apply_chat_template(user, tokenize=False)) :]


def train(
    model: Any, tokenizer: Any, chats: Iterator[Sequence[Message]], schedule: Schedule, name: str
) -> None:
    """Trains `model` in place with AdamW, writing a line of progress to standard error at times.

    Args:
        model: a transformers causal model in float32.
        tokenizer: its tokenizer.
        chats: endless.
        schedule: how long and how fast.
        name: starts the lines of progress.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.98))
    began = reported = time.monotonic()
    seen = 0
    losses: list[float] = []
    model.train()
    batches = _batches(tokenizer, chats, schedule.batch_tokens)
    for step, (ids, mask, labels) in enumerate(batches, 1):
        progress = seen / schedule.tokens
        for group in optimizer.param_groups:
            group["lr"] = schedule.peak * _rate(progress)
        # Half again as fast where the processor has bfloat16, and no worse in the end.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seen += int(mask.sum())
        now = time.monotonic()
        if now - reported > 10 or seen >= schedule.tokens:
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


def _rate(progress: float) -> float:
    warm_up = min(1.0, progress / _WARM_UP + 0.01)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm_up * (0.02 + 0.98 * cosine)


def _batches(
    tokenizer: Any, chats: Iterator[Sequence[Message]], batch_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Padded (ids, mask, labels) batches of chats of similar length, in random order."""
    shuffle = torch.Generator().manual_seed(0)
    while True:
        pool, size = [], 0
        while size < _POOL * batch_tokens:
            pool.append(encode_chat(tokenizer, next(chats)))
            size += len(pool[-1].ids)
        pool.sort(key=lambda encoded: len(encoded.ids))
        batches: list[list[Encoded]] = [[]]
        for encoded in pool:
            if (len(batches[-1]) + 1) * len(encoded.ids) > batch_tokens:
                batches.append([])
            batches[-1].append(encoded)
        for index in torch.randperm(len(batches), generator=shuffle).tolist():
            if batches[index]:
                yield _padded(batches[index], tokenizer.pad_token_id)


def _padded(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(encoded.ids) for encoded in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, encoded in enumerate(batch):
        ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
        mask[row, : len(encoded.ids)] = 1
        labels[row, : len(encoded.ids)] = torch.tensor(encoded.labels)
    return ids, mask, labels

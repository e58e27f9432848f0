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
        matrix_rate: greatest learning rate of the hidden matrices, which Muon trains.
        other_rate: that of embeddings and norms, which AdamW trains. Both warm up over the first
            2 % and fall as a cosine.
    """

    tokens: int
    batch_tokens: int = 2048
    matrix_rate: float = 2e-2
    other_rate: float = 3e-3


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
    """Trains `model` in place, writing a line of progress to standard error at times.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) needs fewer steps for the
    matrices than AdamW does.

    Args:
        model: a transformers causal model in float32.
        tokenizer: its tokenizer.
        chats: endless.
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
    batches = _batches(tokenizer, chats, schedule.batch_tokens)
    for step, (ids, labels, tokens) in enumerate(batches, 1):
        loss = _loss(model, ids, labels)
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        losses.append(loss.item())
        seen += tokens
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


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens.

    Padding is on the right, where causal attention never sees it, so no mask slows attention down;
    and the head works on the labelled positions only.
    """
    # Half again as fast where the processor has bfloat16, and no worse in the end.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        labelled = labels[:, 1:] != _IGNORED
        logits = model.lm_head(hidden[:, :-1][labelled])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][labelled])


def _rate(progress: float) -> float:
    warm_up = min(1.0, progress / _WARM_UP + 0.01)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm_up * (0.02 + 0.98 * cosine)


def _batches(
    tokenizer: Any, chats: Iterator[Sequence[Message]], batch_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(ids, labels, number of tokens) batches of chats of similar length, in random order."""
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


def _padded(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    width = max(len(encoded.ids) for encoded in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, encoded in enumerate(batch):
        ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
        labels[row, : len(encoded.ids)] = torch.tensor(encoded.labels)
    return ids, labels, sum(len(encoded.ids) for encoded in batch)

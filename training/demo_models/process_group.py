"""The processes that train a model together: a torch.distributed group, or one alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from training.demo_models.forward import precision


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def size() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def least(count: int) -> int:
    """The least of all processes' counts."""
    if size() == 1:
        return count
    found = torch.tensor(count)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return int(found.item())


def share(model: Any, tokens: int) -> int:
    """Gives every process the mean of all gradients; returns the sum of their tokens."""
    if size() == 1:
        return tokens
    parameters = [p for p in model.parameters() if p.grad is not None]
    # Products of matrices gave them in this precision.
    flat = torch.cat([p.grad.flatten().to(precision()) for p in parameters])
    torch.distributed.all_reduce(flat)
    gradients = torch.split(flat.float() / size(), [p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    count = torch.tensor(tokens)
    torch.distributed.all_reduce(count)
    return int(count.item())

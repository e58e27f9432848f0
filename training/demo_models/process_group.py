"""The torch.distributed group of the processes that train one model, or a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from training.demo_models.forward import fast_dtype


def rank() -> int:
    """Index of this process, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_reduce_min(count: int) -> int:
    """The minimum of `count` over all processes."""
    if world_size() == 1:
        return count
    found = torch.tensor(count)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return int(found.item())


def average_gradients(model: Any, tokens: int) -> int:
    """Replaces gradients by their mean over all processes; returns the sum of `tokens`."""
    if world_size() == 1:
        return tokens
    parameters = [p for p in model.parameters() if p.grad is not None]
    # The backward pass computed them in this type, so nothing is lost in it.
    flat = torch.cat([p.grad.flatten().to(fast_dtype()) for p in parameters])
    torch.distributed.all_reduce(flat)
    gradients = torch.split(flat.float() / world_size(), [p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    count = torch.tensor(tokens)
    torch.distributed.all_reduce(count)
    return int(count.item())

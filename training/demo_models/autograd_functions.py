"""What lies between the products of matrices in training, each with a backward pass of its own."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.nn.functional import pad, silu

_BLOCK: Final = 32
"""Inputs that share a step in int4."""


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """What onnxruntime's symmetric int4 (MatMulNBits) makes of a matrix.

    Args:
        matrix: (outputs, inputs); in blocks of 32 inputs, and what is left.

    Returns:
        a matrix of the same shape: in each block the value of the greatest magnitude is -8 steps,
        and all are whole steps from -8 to 7.
    """
    outputs, inputs = matrix.shape
    blocks = pad(matrix, (0, -inputs % _BLOCK)).view(outputs, -1, _BLOCK)
    lowest, highest = torch.aminmax(blocks, dim=2, keepdim=True)
    step = torch.where(-lowest >= highest, lowest, highest) / -8.0
    step.masked_fill_(step == 0, 1.0)
    near = (blocks / step).round_().clamp_(-8, 7).mul_(step)
    return near.view(outputs, -1)[:, :inputs]


class Rounded(torch.autograd.Function):
    """A matrix as `rounded`, with the gradients of the rounded one, so that what is kept learns to
    answer well once it is rounded (the straight-through estimator: Bengio et al. 2013,
    arXiv:1308.3432)."""

    @staticmethod
    def forward(_: Any, matrix: torch.Tensor) -> Any:
        return rounded(matrix)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> Any:
        return gradient


def _turn(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Pairs of values, one of each half, turned by their position's angles (rotary embeddings: Su et
    al. 2021, arXiv:2104.09864).

    Args:
        states: (heads, rows, length, dimension).
        cosine, sine: (1, length, dimension), the second half like the first.
    """
    dimension = states.shape[-1]
    # A product with this is quicker than passes over halves: (a, b) becomes (-b, a).
    quarter = torch.eye(dimension, dtype=states.dtype).roll(dimension // 2, 1)
    quarter[dimension // 2 :].neg_()
    return (states * cosine).addcmul_(states @ quarter, sine)


class Turned(torch.autograd.Function):
    """Queries, keys and values by head, the former two turned.

    Args:
        qkv: (rows, length, 3 * hidden).
        of_queries, of_keys: cosines and sines of their angles, (2, 1, length, dimension).
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, heads: int, of_queries: torch.Tensor, of_keys: torch.Tensor
    ) -> Any:
        ctx.save_for_backward(of_queries, of_keys)
        queries, keys, values = (
            qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 3, 0, 1, 4).contiguous()
        )
        return _turn(queries, *of_queries), _turn(keys, *of_keys), values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        turned = [
            _turn(gradient, cosine, -sine)
            for gradient, (cosine, sine) in zip(gradients, ctx.saved_tensors, strict=False)
        ]
        heads, rows, length, dimension = gradients[0].shape
        found = gradients[0].new_empty(rows, length, 3, heads, dimension)
        for index, part in enumerate((*turned, gradients[2])):
            found[:, :, index] = part.permute(1, 2, 0, 3)
        return found.flatten(2), None, None, None


class Attention(torch.autograd.Function):
    """softmax(Q K^T + later) V; the fused kernel's backward pass is slower.

    Args:
        queries, keys, values: (heads, rows, length, dimension), the former scaled.
        later: (length of queries, length of keys), -inf where a key is not to be seen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        later: torch.Tensor,
    ) -> Any:
        q, k, v = (part.flatten(0, 1) for part in (queries, keys, values))
        weights = torch.softmax(torch.baddbmm(later, q, k.transpose(1, 2)), -1)
        found = weights @ v
        ctx.save_for_backward(q, k, v, weights, found)
        return found.view_as(queries)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        q, k, v, weights, found = ctx.saved_tensors
        heads_and_rows = gradient.shape[:2]
        of_found = gradient.flatten(0, 1)
        along = (of_found * found).sum(-1, keepdim=True)
        of_scores = torch.baddbmm(along, of_found, v.transpose(1, 2), beta=-1.0).mul_(weights)
        gradients = (
            of_scores @ k,
            of_scores.transpose(1, 2) @ q,
            weights.transpose(1, 2) @ of_found,
        )
        return *(part.view(*heads_and_rows, *part.shape[1:]) for part in gradients), None


class Gated(torch.autograd.Function):
    """silu(gate) * up, of both side by side."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> Any:
        gate, up = gate_up.chunk(2, -1)
        opened = silu(gate)
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gate_up, opened = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        found = torch.empty_like(gate_up)
        of_gate, of_up = found.chunk(2, -1)
        torch.mul(gradient, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found


class RootMeanSquareNorm(torch.autograd.Function):
    """States over their root mean square, times a weight (Zhang and Sennrich 2019,
    arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Any:
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / states.shape[-1] + epsilon).to(states.dtype)
        unit = states * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        unit, scale, weight = ctx.saved_tensors
        of_weight = (gradient * unit).flatten(0, -2)
        along = (of_weight @ weight).view_as(scale) / len(weight)
        of_states = torch.addcmul(gradient * weight, unit, along, value=-1).mul_(scale)
        return of_states, of_weight.sum(0), None

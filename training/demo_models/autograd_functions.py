"""The operations between matrix products in training, each with its own backward pass."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.nn.functional import pad, silu

_BLOCK: Final = 32
"""Number of inputs that share one int4 scale."""


def int4_rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Rounds a matrix to what onnxruntime's symmetric int4 (MatMulNBits) represents.

    Args:
        matrix: (outputs, inputs); each block of 32 inputs has its own scale, the last may be
            shorter.

    Returns:
        A matrix of the same shape. In each block the value of greatest magnitude becomes -8 times
        the scale, and every value a multiple of the scale from -8 to 7.
    """
    outputs, inputs = matrix.shape
    blocks = pad(matrix, (0, -inputs % _BLOCK)).view(outputs, -1, _BLOCK)
    lowest, highest = torch.aminmax(blocks, dim=2, keepdim=True)
    step = torch.where(-lowest >= highest, lowest, highest) / -8.0
    step.masked_fill_(step == 0, 1.0)
    near = (blocks / step).round_().clamp_(-8, 7).mul_(step)
    return near.view(outputs, -1)[:, :inputs]


class StraightThroughInt4(torch.autograd.Function):
    """`int4_rounded`, with a backward pass that ignores the rounding.

    This is the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): the float32
    weights learn to do well once rounded.
    """

    @staticmethod
    def forward(_: Any, matrix: torch.Tensor) -> Any:
        return int4_rounded(matrix)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> Any:
        return gradient


def _rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): rotates pairs of values, one
    of each half of `dimension`, by the angles of their position.

    Args:
        states: (heads, rows, length, dimension).
        cosine, sine: (1, length, dimension), the second half like the first.
    """
    dimension = states.shape[-1]
    # Multiplying by this, (a, b) becomes (-b, a); faster than copying the halves.
    quarter = torch.eye(dimension, dtype=states.dtype).roll(dimension // 2, 1)
    quarter[dimension // 2 :].neg_()
    return (states * cosine).addcmul_(states @ quarter, sine)


class RotaryHeads(torch.autograd.Function):
    """Splits queries, keys and values by head, and rotates queries and keys.

    Args:
        qkv: (rows, length, 3 * hidden).
        of_queries, of_keys: cosines and sines of the angles, each (2, 1, length, dimension).
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, heads: int, of_queries: torch.Tensor, of_keys: torch.Tensor
    ) -> Any:
        ctx.save_for_backward(of_queries, of_keys)
        queries, keys, values = (
            qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 3, 0, 1, 4).contiguous()
        )
        return _rotate(queries, *of_queries), _rotate(keys, *of_keys), values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        turned = [
            _rotate(gradient, cosine, -sine)
            for gradient, (cosine, sine) in zip(gradients, ctx.saved_tensors, strict=False)
        ]
        heads, rows, length, dimension = gradients[0].shape
        found = gradients[0].new_empty(rows, length, 3, heads, dimension)
        for index, part in enumerate((*turned, gradients[2])):
            found[:, :, index] = part.permute(1, 2, 0, 3)
        return found.flatten(2), None, None, None


class Attention(torch.autograd.Function):
    """softmax(Q K^T + later) V. The backward pass of torch's fused kernel is slower.

    Args:
        queries, keys, values: (heads, rows, length, dimension); queries are already scaled.
        later: (length of queries, length of keys), -inf for each key that comes after the query,
            else 0.
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


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up; the input is gate and up, concatenated."""

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
    """RMSNorm: states over their root mean square, times a weight (Zhang and Sennrich 2019,
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

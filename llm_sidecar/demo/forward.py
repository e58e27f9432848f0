"""The forward pass of training: transformers' model, with less to do between its matrices.

In a model this small, products of matrices take less time than what is done to each of their
elements. So all but the embeddings is in the precision that the processor is quick at, attention and
norms go over their inputs fewer times than transformers' own, and what all texts begin with is
reckoned once. What comes out is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch.func import functional_call
from torch.nn.functional import embedding, linear, pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

_BLOCK: Final = 32
"""Inputs that share a step in int4."""
_EMBEDDING: Final = "embed_tokens.weight"
_ATTENTION: Final = "causal_with_queries_and_keys"
"""Name of `_attention` in transformers."""


def precision() -> torch.dtype:
    """Of the matrices that this processor multiplies fastest: bfloat16 or float32."""
    found = torch.cpu.get_capabilities()
    quick = found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.bfloat16 if quick else torch.float32


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
    near = torch.round(blocks / step).clamp_(-8, 7).mul_(step)
    return near.view(outputs, -1)[:, :inputs]


class Held(NamedTuple):
    """A model's weights as a forward pass multiplies them.

    Attributes:
        embeddings: (vocabulary, hidden) in float32: gradients of a token that comes often would be
            lost in a sum of bfloat16.
        others: by name, in the precision that the processor is quick at.
    """

    embeddings: torch.Tensor
    others: dict[str, torch.Tensor]


def hold(model: Any, *, int4: bool) -> Held:
    """The model's weights; what is learned of these goes to its own.

    Args:
        model: of the Llama or the Phi-3 architecture in float32, with as many key heads as query
            heads and its embeddings tied to its head.
        int4: whether matrices are what int4 would hold of them. Their gradients are those of the
            rounded ones, so the weights that are kept learn to answer well once they are rounded
            (the straight-through estimator: Bengio et al. 2013, arXiv:1308.3432).
    """
    weights = {
        name: _straight_through(weight) if int4 and weight.ndim == 2 else weight
        for name, weight in model.model.named_parameters()
    }
    embeddings = weights.pop(_EMBEDDING)
    return Held(embeddings, {name: weight.to(precision()) for name, weight in weights.items()})


class States(NamedTuple):
    """What a model made of some texts.

    Attributes:
        last: (rows, length, hidden), of the last layer, after its norm.
        looks: of each layer, queries and keys as attention multiplies them, of shapes (rows, heads,
            length, dimension) and (rows, heads, shared + length, dimension); none unless asked for.
    """

    last: torch.Tensor
    looks: Sequence[tuple[torch.Tensor, torch.Tensor]]


def forward(
    model: Any, held: Held, shared: torch.Tensor, ids: torch.Tensor, *, looking: bool = False
) -> States:
    """The states of texts whose padding, if any, is on the right, where none of them sees it.

    Args:
        model: gives the architecture.
        held: its weights.
        shared: (shared,), tokens that all texts begin with, reckoned once; maybe none.
        ids: (rows, length), those that follow.
        looking: whether to give queries and keys.
    """
    model.set_attn_implementation(_ATTENTION)

    def states(tokens: torch.Tensor, first: int, before: Sequence[_Look], looking: bool) -> Any:
        inputs = {
            "inputs_embeds": embedding(tokens, held.embeddings).to(precision()),
            "position_ids": torch.arange(first, first + tokens.shape[1])[None],
            "before": before,
            "output_attentions": looking,
            "use_cache": False,
        }
        return functional_call(model.model, held.others, kwargs=inputs)

    with _quick_norms(model):
        before = states(shared[None], 0, (), True).attentions if len(shared) else ()
        found = states(ids, len(shared), before, looking)
    looks = [(look.queries, look.keys) for look in found.attentions or ()]
    return States(found.last_hidden_state, looks)


def logits(held: Held, states: States, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of the tokens that follow some places, (places, vocabulary)."""
    return linear(states.last[rows, places], held.embeddings.to(precision()))


def attention(
    queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """How much some places attend to each one of their rows, (places, heads, shared + length).

    Args:
        queries, keys: as in `States.looks`.
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    shared = keys.shape[2] - queries.shape[2]
    later = torch.arange(keys.shape[2]) > shared + places[:, None, None]
    return torch.softmax(scores[rows, :, places].float().masked_fill(later, -torch.inf), -1)


def _straight_through(matrix: torch.Tensor) -> torch.Tensor:
    return matrix + (rounded(matrix.detach()) - matrix.detach())


class _Look(NamedTuple):
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    *,
    before: Sequence[_Look] = (),
    **_: Any,
) -> tuple[torch.Tensor, _Look]:
    """Causal attention; gives what it was reckoned of where others give their weights.

    Args:
        before: of each layer, what the shared beginning gave; or nothing.
    """
    if before:
        rows, shared = len(query), before[module.layer_idx]
        key = torch.cat((shared.keys.expand(rows, -1, -1, -1), key), 2)
        value = torch.cat((shared.values.expand(rows, -1, -1, -1), value), 2)
    length, keys = query.shape[2], key.shape[2]
    later = query.new_full((length, keys), -torch.inf).triu_(1 + keys - length)
    if torch.is_grad_enabled():
        # The fused kernel's backward pass is slow.
        scores = ((query * scaling) @ key.transpose(2, 3)).add_(later)
        found = torch.softmax(scores, -1) @ value
    else:
        found = scaled_dot_product_attention(query, key, value, later, scale=scaling)
    return found.transpose(1, 2).contiguous(), _Look(query, key, value)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


@contextlib.contextmanager
def _quick_norms(model: Any) -> Iterator[None]:
    norms = [part for part in model.modules() if type(part).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = partial(_normed, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normed(norm: Any, states: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _RootMeanSquareNorm.apply(  # type: ignore[no-untyped-call]
        states, norm.weight, norm.variance_epsilon
    )
    return found


class _RootMeanSquareNorm(torch.autograd.Function):
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

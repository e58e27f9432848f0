"""The forward pass of training: the result of transformers, with fewer passes over memory.

In a model this small, matrix products take less time than elementwise operations. So everything but
the embeddings is in the type that the processor multiplies fastest, the operations between the
products have backward passes of their own, and tokens that all rows begin with are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from training.demo_models.autograd_functions import (
    Attention,
    GatedSilu,
    RootMeanSquareNorm,
    RotaryHeads,
    StraightThroughInt4,
)


def fast_dtype() -> torch.dtype:
    """The type in which this processor multiplies matrices fastest: bfloat16 or float32."""
    found = torch.cpu.get_capabilities()
    quick = found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.bfloat16 if quick else torch.float32


class _Layer(NamedTuple):
    """Weights of one layer in the order of use; matrices with the same input are concatenated."""

    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Weights(NamedTuple):
    """A model's weights, cast for the forward pass.

    Attributes:
        embeddings: (vocabulary, hidden), in float32: summing the gradients of a frequent token in
            bfloat16 would lose most of them.
        layers: in `fast_dtype`.
        norm: (hidden,), of the norm after the last layer, in `fast_dtype`.
    """

    embeddings: torch.Tensor
    layers: list[_Layer]
    norm: torch.Tensor


def cast_weights(model: Any, *, int4: bool) -> Weights:
    """Casts a model's weights; gradients flow back to the model's own.

    Args:
        model: a Llama or Phi-3 of transformers in float32, with as many key heads as query heads
            and an output head that shares the weights of the embeddings.
        int4: whether to round matrices to what int4 can represent.
    """

    def rounded(weight: torch.Tensor) -> Any:
        return StraightThroughInt4.apply(weight) if int4 else weight  # type: ignore[no-untyped-call]

    def weight(*pieces: Any) -> torch.Tensor:
        found = [rounded(part.weight) for part in pieces]
        return (found[0] if len(found) == 1 else torch.cat(found)).to(fast_dtype())

    def layer(part: Any) -> _Layer:
        attention, mlp = part.self_attn, part.mlp
        fused = hasattr(attention, "qkv_proj")
        qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        return _Layer(
            part.input_layernorm.weight.to(fast_dtype()),
            weight(*(getattr(attention, name) for name in qkv)),
            weight(attention.o_proj),
            part.post_attention_layernorm.weight.to(fast_dtype()),
            weight(*(getattr(mlp, name) for name in gate_up)),
            weight(mlp.down_proj),
        )

    body = model.model
    embeddings = body.embed_tokens.weight
    return Weights(
        rounded(embeddings),
        [layer(part) for part in body.layers],
        body.norm.weight.to(fast_dtype()),
    )


class States(NamedTuple):
    """The result of a forward pass.

    Attributes:
        last: (positions, hidden), hidden states after the last norm, at the requested positions.
        attention_inputs: for each layer its scaled queries, (heads, rows, length, dimension), and
            its keys, (heads, rows, shared + length, dimension); empty unless requested.
    """

    last: torch.Tensor
    attention_inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]


def forward(
    model: Any,
    weights: Weights,
    shared: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    with_attention: bool = False,
) -> States:
    """Runs the model on a batch. Padding is on the right, so causal attention never sees it.

    Args:
        model: defines the architecture.
        weights: its weights.
        shared: (shared,), leading tokens of all rows, computed once; may be empty.
        ids: (rows, length), the tokens after those.
        rows, positions: both (positions,), the tokens of `ids` whose states to return; the last
            layer computes no others.
        with_attention: whether to return queries and keys.
    """
    none = rows[:0]
    before = _layers(model, weights, shared[None], 0, (), none)[1] if len(shared) else ()
    requested = rows * ids.shape[1] + positions
    last, inputs = _layers(model, weights, ids, len(shared), before, requested)
    returned = [(layer.queries, layer.keys) for layer in inputs] if with_attention else []
    return States(_normed(last, weights.norm, model.config), returned)


def logits(weights: Weights, states: States) -> torch.Tensor:
    """Logits of the tokens after the requested positions, (positions, vocabulary)."""
    return linear(states.last, weights.embeddings.to(fast_dtype()))


def attention(
    queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Attention weights from some positions to their rows, (positions, heads, shared + length).

    Args:
        queries, keys: of one layer in `States.attention_inputs`, or some of its heads.
        rows, positions: both (positions,), the tokens of `ids` that attend.
    """
    scores = (queries @ keys.transpose(2, 3))[:, rows, positions].float()
    shared = keys.shape[2] - queries.shape[2]
    later = torch.arange(keys.shape[2]) > shared + positions[:, None]
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1).transpose(0, 1)


class _AttentionInputs(NamedTuple):
    """The inputs of attention in one layer, each (heads, rows, length, dimension)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def _layers(
    model: Any,
    weights: Weights,
    tokens: torch.Tensor,
    first: int,
    before: Sequence[_AttentionInputs],
    requested: torch.Tensor,
) -> tuple[torch.Tensor, list[_AttentionInputs]]:
    """The states after the last layer, and the attention inputs of each layer.

    Args:
        tokens: (rows, length).
        first: position of the first token of each row.
        before: for each layer, the inputs of the tokens before `first`, which all rows share; may
            be empty.
        requested: indexes into the flattened `tokens`, whose states to return.
    """
    config = model.config
    heads = config.num_attention_heads
    rows, length = tokens.shape
    later = torch.full((length, first + length), -torch.inf, dtype=fast_dtype())
    later.triu_(1 + first)
    states = embedding(tokens, weights.embeddings).to(fast_dtype())
    # The rotation also scales the queries.
    angles = torch.stack(model.model.rotary_emb(states, torch.arange(first, first + length)[None]))
    rotation = (angles * (angles.shape[-1] ** -0.5), angles)
    inputs = []
    for index, layer in enumerate(weights.layers):
        qkv = linear(_normed(states, layer.norm, config), layer.qkv)
        queries, keys, values = RotaryHeads.apply(qkv, heads, *rotation)  # type: ignore[no-untyped-call]
        if before:
            keys = torch.cat((before[index].keys.expand(-1, rows, -1, -1), keys), 2)
            values = torch.cat((before[index].values.expand(-1, rows, -1, -1), values), 2)
        inputs.append(_AttentionInputs(queries, keys, values))
        if torch.is_grad_enabled():
            found = Attention.apply(queries, keys, values, later)  # type: ignore[no-untyped-call]
        else:
            found = scaled_dot_product_attention(queries, keys, values, later, scale=1.0)
        found = found.permute(1, 2, 0, 3).flatten(2)
        if index == len(weights.layers) - 1:
            # No later layer attends to the other positions.
            found, states = (
                part.flatten(0, 1).index_select(0, requested) for part in (found, states)
            )
        states = states + linear(found, layer.out)
        gate_up = linear(_normed(states, layer.mlp_norm, config), layer.gate_up)
        states = states + linear(GatedSilu.apply(gate_up), layer.down)  # type: ignore[no-untyped-call]
    return states, inputs


def _normed(states: torch.Tensor, weight: torch.Tensor, config: Any) -> torch.Tensor:
    found: torch.Tensor = RootMeanSquareNorm.apply(  # type: ignore[no-untyped-call]
        states, weight, config.rms_norm_eps
    )
    return found

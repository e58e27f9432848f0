"""The forward pass of training: what transformers reckons, with fewer passes over memory.

In a model this small, products of matrices take less time than what is done to each of their
elements. So all but the embeddings is in the precision that the processor is quick at, what lies
between products has its own backward pass, and what all texts begin with is reckoned once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from training.demo_models.autograd_functions import (
    Attention,
    Gated,
    RootMeanSquareNorm,
    Rounded,
    Turned,
)


def precision() -> torch.dtype:
    """Of the matrices that this processor multiplies fastest: bfloat16 or float32."""
    found = torch.cpu.get_capabilities()
    quick = found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.bfloat16 if quick else torch.float32


class _Layer(NamedTuple):
    """Weights of one layer in the order of their use; those that are used together are one."""

    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Held(NamedTuple):
    """A model's weights as a forward pass multiplies them.

    Attributes:
        embeddings: (vocabulary, hidden) in float32: gradients of a token that comes often would be
            lost in a sum of bfloat16.
        layers, norm: of the layers and of the norm behind them, in the precision that the processor
            is quick at.
    """

    embeddings: torch.Tensor
    layers: list[_Layer]
    norm: torch.Tensor


def hold(model: Any, *, int4: bool) -> Held:
    """The model's weights; what is learned of these goes to its own.

    Args:
        model: of the Llama or the Phi-3 architecture in float32, with as many key heads as query
            heads and its embeddings tied to its head.
        int4: whether matrices are what int4 would hold of them.
    """

    def rounded(weight: torch.Tensor) -> Any:
        return Rounded.apply(weight) if int4 else weight  # type: ignore[no-untyped-call]

    def weight(*parts: Any) -> torch.Tensor:
        found = [rounded(part.weight) for part in parts]
        return (found[0] if len(found) == 1 else torch.cat(found)).to(precision())

    def layer(part: Any) -> _Layer:
        attention, mlp = part.self_attn, part.mlp
        fused = hasattr(attention, "qkv_proj")
        qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        return _Layer(
            part.input_layernorm.weight.to(precision()),
            weight(*(getattr(attention, name) for name in qkv)),
            weight(attention.o_proj),
            part.post_attention_layernorm.weight.to(precision()),
            weight(*(getattr(mlp, name) for name in gate_up)),
            weight(mlp.down_proj),
        )

    body = model.model
    embeddings = body.embed_tokens.weight
    return Held(
        rounded(embeddings),
        [layer(part) for part in body.layers],
        body.norm.weight.to(precision()),
    )


class States(NamedTuple):
    """What a model made of some texts.

    Attributes:
        last: (places, hidden), of the last layer, after its norm, at the places asked for.
        looks: of each layer, queries as attention multiplies them and keys, of shapes (heads, rows,
            length, dimension) and (heads, rows, shared + length, dimension); none unless asked for.
    """

    last: torch.Tensor
    looks: Sequence[tuple[torch.Tensor, torch.Tensor]]


def forward(
    model: Any,
    held: Held,
    shared: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    *,
    looking: bool = False,
) -> States:
    """The states of texts whose padding, if any, is on the right, where none of them sees it.

    Args:
        model: gives the architecture.
        held: its weights.
        shared: (shared,), tokens that all texts begin with, reckoned once; maybe none.
        ids: (rows, length), those that follow.
        rows, places: (places,), where in `ids` states are asked for: the last layer ends there.
        looking: whether to give queries and keys.
    """
    nowhere = rows[:0]
    before = _layers(model, held, shared[None], 0, (), nowhere)[1] if len(shared) else ()
    asked = rows * ids.shape[1] + places
    last, attended = _layers(model, held, ids, len(shared), before, asked)
    looks = [(part.queries, part.keys) for part in attended] if looking else []
    return States(_normed(last, held.norm, model.config), looks)


def logits(held: Held, states: States) -> torch.Tensor:
    """Of the tokens that follow the places, (places, vocabulary)."""
    return linear(states.last, held.embeddings.to(precision()))


def attention(
    queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """How much some places attend to each one of their rows, (places, heads, shared + length).

    Args:
        queries, keys: as in `States.looks`, or some of their heads.
    """
    scores = (queries @ keys.transpose(2, 3))[:, rows, places].float()
    shared = keys.shape[2] - queries.shape[2]
    later = torch.arange(keys.shape[2]) > shared + places[:, None]
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1).transpose(0, 1)


class _Attended(NamedTuple):
    """What attention was reckoned of in one layer, each (heads, rows, length, dimension)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def _layers(
    model: Any,
    held: Held,
    tokens: torch.Tensor,
    first: int,
    before: Sequence[_Attended],
    asked: torch.Tensor,
) -> tuple[torch.Tensor, list[_Attended]]:
    """The states of some tokens after the last layer, and what was attended to in each.

    Args:
        tokens: (rows, length).
        first: position of the first of them.
        before: of each layer, of the tokens before that, which all rows share; or nothing.
        asked: of which tokens, numbered through the rows.
    """
    config = model.config
    heads = config.num_attention_heads
    rows, length = tokens.shape
    later = torch.full((length, first + length), -torch.inf, dtype=precision())
    later.triu_(1 + first)
    states = embedding(tokens, held.embeddings).to(precision())
    # Queries are scaled as they are turned.
    turns = torch.stack(model.model.rotary_emb(states, torch.arange(first, first + length)[None]))
    turn = (turns * (turns.shape[-1] ** -0.5), turns)
    attended = []
    for index, layer in enumerate(held.layers):
        qkv = linear(_normed(states, layer.norm, config), layer.qkv)
        queries, keys, values = Turned.apply(qkv, heads, *turn)  # type: ignore[no-untyped-call]
        if before:
            keys = torch.cat((before[index].keys.expand(-1, rows, -1, -1), keys), 2)
            values = torch.cat((before[index].values.expand(-1, rows, -1, -1), values), 2)
        attended.append(_Attended(queries, keys, values))
        if torch.is_grad_enabled():
            found = Attention.apply(queries, keys, values, later)  # type: ignore[no-untyped-call]
        else:
            found = scaled_dot_product_attention(queries, keys, values, later, scale=1.0)
        found = found.permute(1, 2, 0, 3).flatten(2)
        if index == len(held.layers) - 1:
            # Nothing attends to what comes behind this.
            found, states = (part.flatten(0, 1).index_select(0, asked) for part in (found, states))
        states = states + linear(found, layer.out)
        gate_up = linear(_normed(states, layer.mlp_norm, config), layer.gate_up)
        states = states + linear(Gated.apply(gate_up), layer.down)  # type: ignore[no-untyped-call]
    return states, attended


def _normed(states: torch.Tensor, weight: torch.Tensor, config: Any) -> torch.Tensor:
    found: torch.Tensor = RootMeanSquareNorm.apply(  # type: ignore[no-untyped-call]
        states, weight, config.rms_norm_eps
    )
    return found

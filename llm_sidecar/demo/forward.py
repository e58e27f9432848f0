"""The forward pass of training: what transformers reckons, with fewer passes over memory.

In a model this small, products of matrices take less time than what is done to each of their
elements. So all but the embeddings is in the precision that the processor is quick at, what lies
between products has its own backward pass, and what all texts begin with is reckoned once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import embedding, linear, pad, scaled_dot_product_attention, silu

_BLOCK: Final = 32
"""Inputs that share a step in int4."""


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


class _Layer(NamedTuple):
    """Weights of one layer in the order they are used; of `qkv` and `gate_up` more than one side
    by side."""

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
        layers: in the precision that the processor is quick at, as is
        norm: the last one's weights.
    """

    embeddings: torch.Tensor
    layers: list[_Layer]
    norm: torch.Tensor


def hold(model: Any, *, int4: bool) -> Held:
    """The model's weights; what is learned of these goes to its own.

    Args:
        model: of the Llama or the Phi-3 architecture in float32, with as many key heads as query
            heads and its embeddings tied to its head.
        int4: whether matrices are what int4 would hold of them. Their gradients are those of the
            rounded ones, so the weights that are kept learn to answer well once they are rounded
            (the straight-through estimator: Bengio et al. 2013, arXiv:1308.3432).
    """

    def weight(*parts: Any) -> torch.Tensor:
        found = [_straight_through(part.weight) if int4 else part.weight for part in parts]
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
        _straight_through(embeddings) if int4 else embeddings,
        [layer(part) for part in body.layers],
        body.norm.weight.to(precision()),
    )


class States(NamedTuple):
    """What a model made of some texts.

    Attributes:
        last: (rows, length, hidden), of the last layer, after its norm.
        looks: of each layer, queries as attention multiplies them and keys, of shapes (heads, rows,
            length, dimension) and (heads, rows, shared + length, dimension); none unless asked for.
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
    before = _layers(model, held, shared[None], 0, ())[1] if len(shared) else ()
    last, attended = _layers(model, held, ids, len(shared), before)
    looks = [(part.queries, part.keys) for part in attended] if looking else []
    return States(_normed(last, held.norm, model.config), looks)


def logits(held: Held, states: States, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of the tokens that follow some places, (places, vocabulary)."""
    return linear(states.last[rows, places], held.embeddings.to(precision()))


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


def _straight_through(matrix: torch.Tensor) -> torch.Tensor:
    return matrix + (rounded(matrix.detach()) - matrix.detach())


class _Attended(NamedTuple):
    """What attention was reckoned of in one layer, each (heads, rows, length, dimension)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def _layers(
    model: Any, held: Held, tokens: torch.Tensor, first: int, before: Sequence[_Attended]
) -> tuple[torch.Tensor, list[_Attended]]:
    """The states of some tokens after the last layer, and what was attended to in each.

    Args:
        tokens: (rows, length).
        first: position of the first of them.
        before: of each layer, of the tokens before that, which all rows share; or nothing.
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
        queries, keys, values = _Turned.apply(qkv, heads, *turn)  # type: ignore[no-untyped-call]
        if before:
            keys = torch.cat((before[index].keys.expand(-1, rows, -1, -1), keys), 2)
            values = torch.cat((before[index].values.expand(-1, rows, -1, -1), values), 2)
        attended.append(_Attended(queries, keys, values))
        if torch.is_grad_enabled():
            found = _Attention.apply(queries, keys, values, later)  # type: ignore[no-untyped-call]
        else:
            found = scaled_dot_product_attention(queries, keys, values, later, scale=1.0)
        states = states + linear(found.permute(1, 2, 0, 3).flatten(2), layer.out)
        gate_up = linear(_normed(states, layer.mlp_norm, config), layer.gate_up)
        states = states + linear(_Gated.apply(gate_up), layer.down)  # type: ignore[no-untyped-call]
    return states, attended


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


class _Turned(torch.autograd.Function):
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


class _Attention(torch.autograd.Function):
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


class _Gated(torch.autograd.Function):
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


def _normed(states: torch.Tensor, weight: torch.Tensor, config: Any) -> torch.Tensor:
    found: torch.Tensor = _RootMeanSquareNorm.apply(  # type: ignore[no-untyped-call]
        states, weight, config.rms_norm_eps
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

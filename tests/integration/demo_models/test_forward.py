"""The forward pass of training, compared with that of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from training.demo_models.autograd_functions import int4_rounded
from training.demo_models.forward import attention, cast_weights, forward, logits
from training.demo_models.trainer import init_attention


@pytest.mark.parametrize("name", ["phi3", "hermes"])
def test_training_computes_what_transformers_does(name: str) -> None:
    torch.manual_seed(4)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    model = (
        Phi3ForCausalLM(Phi3Config(**shape))
        if name == "phi3"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    init_attention(model)
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.ndim == 2:
                matrix.copy_(int4_rounded(matrix))
    shared, ids = torch.randint(2, 128, (9,)), torch.randint(2, 128, (3, 20))
    rows, positions = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 7, 3, 19])
    whole = torch.cat((shared.expand(3, -1), ids), 1)
    target = torch.randn(4, 128)

    model.set_attn_implementation("eager")
    expected = model(input_ids=whole, output_attentions=True)
    (expected.logits[rows, len(shared) + positions] * target).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    weights = cast_weights(model, int4=True)
    states = forward(model, weights, shared, ids, rows, positions, with_attention=True)
    found = logits(weights, states)
    (found * target).sum().backward()  # type: ignore[no-untyped-call]

    # To the precision of bfloat16.
    torch.testing.assert_close(
        found.float(), expected.logits[rows, len(shared) + positions], atol=0.06, rtol=0.06
    )
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        cosine = torch.nn.functional.cosine_similarity(
            parameter.grad.flatten(), gradient.flatten(), 0
        )
        assert cosine > 0.999
        assert 0.98 < parameter.grad.norm() / gradient.norm() < 1.02
    for layer in range(2):
        seen = attention(*states.attention_inputs[layer], rows, positions)
        right = expected.attentions[layer][rows, :, len(shared) + positions]
        torch.testing.assert_close(seen, right, atol=0.02, rtol=0)
    with torch.no_grad():
        again = logits(weights, forward(model, weights, shared, ids, rows, positions))
    torch.testing.assert_close(again, found.detach(), atol=0.06, rtol=0.06)

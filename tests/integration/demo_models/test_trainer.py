"""The training loop and its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
)

from llm_sidecar.models.files import DEMO_DIR
from training.demo_models import proposal_lessons
from training.demo_models.autograd_functions import int4_rounded
from training.demo_models.batches import pad_batch
from training.demo_models.forward import cast_weights
from training.demo_models.lessons import IGNORED, Encoded, encode
from training.demo_models.schedule import Schedule
from training.demo_models.trainer import _hardest, _losses, train


def small_phi3(tokenizer: Any) -> Phi3ForCausalLM:
    """One layer of 32, random."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return Phi3ForCausalLM(
        Phi3Config(
            **shape,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def test_the_prompt_has_a_loss_too_but_not_its_padding() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    model = small_phi3(tokenizer)
    teach = proposal_lessons.candidates(6)
    drawn = [encode(tokenizer, teach(1.0)) for _ in range(12)]
    width = max(lesson.own for lesson in drawn) + 5
    batch = pad_batch(drawn, width, tokenizer.pad_token_id)
    with torch.no_grad():
        weights = cast_weights(model, int4=False)
        found = _losses(model, weights, batch, with_prompt=True).prompt.mean()
        expected: list[float] = []
        for lesson in drawn:
            ids = torch.tensor([lesson.ids])
            logits = model(input_ids=ids).logits[0, lesson.shared : -1]
            following = ids[0, lesson.shared + 1 :]
            each = torch.nn.functional.cross_entropy(logits, following, reduction="none")
            labels = lesson.labels[lesson.shared + 1 :]
            expected += [
                loss for loss, label in zip(each.tolist(), labels, strict=True) if label == IGNORED
            ]
    expected = expected[::3]
    expected = expected[: len(expected) // 128 * 128]
    assert len(expected) >= 128
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=0.01)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    model = small_phi3(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    teach = proposal_lessons.curriculum(1)
    with pytest.raises(FloatingPointError, match="the loss of phi3 is nan in step 1"):
        # Without hints, as this model has not the heads that they are for.
        train(model, tokenizer, lambda _: teach(1.0)._replace(hints=()), Schedule(500), "phi3")


def test_the_hardest_lessons_are_those_with_the_greatest_loss_of_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    model = small_phi3(tokenizer)
    hardest = _hardest(model, tokenizer, proposal_lessons.candidates(5), 3000)
    assert 2000 < sum(lesson.own for lesson in hardest) <= 3000

    teach = proposal_lessons.candidates(5)
    drawn: list[Encoded] = []
    while sum(lesson.own for lesson in drawn) < 12_000:
        drawn.append(encode(tokenizer, teach(1.0)))
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.ndim == 2:
                matrix.copy_(int4_rounded(matrix))
        losses = {}
        for lesson in drawn:
            logits = model(input_ids=torch.tensor([lesson.ids])).logits[0, :-1]
            labels = torch.tensor(lesson.labels[1:])
            each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            losses[tuple(lesson.ids)] = each.max().item()
    hard = {tuple(lesson.ids) for lesson in hardest}
    easiest = min(losses[ids] for ids in hard)
    assert all(loss < easiest + 0.05 for ids, loss in losses.items() if ids not in hard)
    assert max(losses.values()) > min(losses.values()) + 0.2

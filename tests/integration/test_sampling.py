"""A model's own sampling: the same tokens as transformers, in every engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_sidecar import hermes_plugin
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import Sampling
from llm_sidecar.engines.sampling import filtered, penalised
from llm_sidecar.models.files import DEMO_DIR

CHAT = hermes_plugin.chat_messages("Long ABC from 100, now 112.")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.6),
        Sampling(0.8, 50),
        Sampling(1.3, 0, 0.9),
        Sampling(1.0, 0, 1.0, 0.1),
        Sampling(0.7, 40, 0.95, 0.05, 1.1),
        Sampling(2.0, 7, 0.5, 0.3, 1.7),
        Sampling(1.0, 1000, 0.99, 0.0, 0.8),
    ],
)
def test_the_tokens_that_may_follow_are_those_of_transformers(sampling: Sampling) -> None:
    """Compared with a list of the processors in the order in which `generate` applies them."""
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            TemperatureLogitsWarper(sampling.temperature),
        ]
    )
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    random = np.random.default_rng(1)
    for _ in range(20):
        logits = random.normal(0, 4, 3000).astype(np.float32)
        used = random.integers(0, 3000, 400)
        expected = processors(torch.tensor(used)[None], torch.tensor(logits)[None])[0].numpy()
        found = filtered(penalised(logits, np.unique(used), sampling.repetition_penalty), sampling)
        assert np.array_equal(found > -np.inf, expected > -np.inf)
        assert found == pytest.approx(expected, rel=1e-5)


def configured(folder: Path, **generation: Any) -> Path:
    """A copy of the demo model with this generation_config.json."""
    copy = Path(shutil.copytree(DEMO_DIR / "hermes", folder / "hermes"))
    content = {"eos_token_id": 2, "pad_token_id": 0, **generation}
    (copy / "generation_config.json").write_text(json.dumps(content))
    return copy


def written(engine: Engine, seed: int | None = None, temperature: float | None = None) -> str:
    request = GenerationRequest(CHAT, 40, temperature=temperature, seed=seed)
    return "".join(delta.text for delta in engine.stream(request))


def test_a_repetition_penalty_gives_the_text_of_transformers(tmp_path: Path) -> None:
    folder = configured(tmp_path, repetition_penalty=1.4)
    engine = load_engine(folder, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([engine.tokenize(GenerationRequest(CHAT, 40))])
    with torch.inference_mode():
        tokens = model.generate(prompt, attention_mask=prompt >= 0, max_new_tokens=40)
    expected = engine.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    assert written(engine) == expected
    # A temperature of the request wins, and is all of its sampling.
    plain = load_engine(DEMO_DIR / "hermes", device="cpu")
    assert written(engine, temperature=0.0) == written(plain) != expected


def test_a_model_that_samples_repeats_a_text_by_its_seed(tmp_path: Path) -> None:
    engine = load_engine(configured(tmp_path, do_sample=True, temperature=1.5), device="cpu")
    assert engine.sampling == Sampling(1.5, 50)
    assert written(engine, 7) == written(engine, 7)
    assert len({written(engine, seed) for seed in range(5)}) > 1


def test_the_demo_model_stays_greedy() -> None:
    assert load_engine(DEMO_DIR / "hermes", device="cpu").sampling == Sampling()

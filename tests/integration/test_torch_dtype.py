"""The precision that torch computes in, and checkpoints that it cannot load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_sidecar import proposals
from llm_sidecar.engines import EngineOptions, GenerationRequest, load_engine
from llm_sidecar.engines import torch as torch_engine
from llm_sidecar.engines.base import Dtype, unless_failed
from llm_sidecar.engines.torch import TorchEngine
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.local.identity import load_identified
from llm_sidecar.models.local.protocol import Load
from tests.random_models import write_adapter


def load(folder: Path, dtype: Dtype | None, **options: Any) -> TorchEngine:
    engine = load_engine(folder, device="cpu", dtype=dtype, **options)
    assert isinstance(engine, TorchEngine)
    return engine


@pytest.mark.parametrize(("dtype", "found"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_the_model_computes_in_the_precision_asked_for(
    random_phi3_torch: Path, dtype: Dtype | None, found: str
) -> None:
    engine = load(random_phi3_torch, dtype)
    assert engine.dtype == found
    assert {weights.dtype for weights in engine.model.parameters()} == {getattr(torch, found)}


def test_bfloat16_is_near_float32_and_its_logits_are_float32(random_phi3_torch: Path) -> None:
    exact, coarse = (load(random_phi3_torch, dtype) for dtype in (None, "bfloat16"))
    tokens = exact.tokenize(GenerationRequest(proposals.build_messages("Long ABC."), 1))
    expected, found = (engine._logits_after(tokens)[0] for engine in (exact, coarse))
    assert found.dtype == np.float32
    assert not np.array_equal(found, expected)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_proposals_are_valid_in_bfloat16_alone_and_in_a_batch(random_phi3_torch: Path) -> None:
    engine = load(random_phi3_torch, "bfloat16")
    batch = engine.batch()
    texts = dict.fromkeys(range(3), "")
    for number in texts:
        messages = proposals.build_messages(f"Long ABC from {number}.")
        batch.add(number, GenerationRequest(messages, 256, proposals.GUIDANCE))
    while batch:
        for number, result in batch.step():
            texts[number] += unless_failed(result).text
    for text in texts.values():
        proposals.parse(text)


def test_an_adapter_is_used_in_bfloat16(random_phi3_torch: Path, tmp_path: Path) -> None:
    adapter = write_adapter(random_phi3_torch, tmp_path / "20260101")
    request = GenerationRequest(proposals.build_messages("Long ABC."), 1)
    found = []
    for options in ({}, {"adapter": adapter}):
        engine = load(random_phi3_torch, "bfloat16", **options)
        found.append(engine._logits_after(engine.tokenize(request))[0])
    assert np.abs(found[0] - found[1]).max() > 1


def test_auto_is_bfloat16_for_a_large_model_where_the_processor_multiplies_it(
    random_phi3_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "multiplies_bfloat16", lambda: True)
    assert load(random_phi3_torch, "auto").dtype == "float32"
    monkeypatch.setattr(torch_engine, "_SMALL", 1000)
    assert load(random_phi3_torch, "auto").dtype == "bfloat16"
    monkeypatch.setattr(torch_engine, "multiplies_bfloat16", lambda: False)
    assert load(random_phi3_torch, "auto").dtype == "float32"


def test_the_identity_names_a_precision_other_than_float32(random_phi3_torch: Path) -> None:
    folder = str(random_phi3_torch)
    _, exact, _ = load_identified(Load(folder, EngineOptions("cpu")))
    _, coarse, _ = load_identified(Load(folder, EngineOptions("cpu", dtype="bfloat16")))
    assert (exact.dtype, coarse.dtype) == (None, "bfloat16")


def test_weights_stored_in_bfloat16_are_not_copied(random_phi3_torch: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_phi3_torch, tmp_path / "model")
    load(random_phi3_torch, "bfloat16").model.save_pretrained(folder)
    engine = load(folder, "bfloat16")
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    for weights in engine.model.parameters():
        assert any(weights.data_ptr() in addresses for addresses in mapped)


def quantized(folder: Path, copy: Path, **settings: Any) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return copy


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "install optimum and gptqmodel; or take"),
        ({"quant_method": "awq", "bits": 4}, "install gptqmodel; or take"),
        ({"quant_method": "compressed-tensors"}, "install compressed-tensors; or take"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "install bitsandbytes; or take"),
        # transformers says it.
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    ],
)
def test_a_quantized_checkpoint_says_in_one_line_what_is_missing(
    random_hermes_torch: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    folder = quantized(random_hermes_torch, tmp_path / "model", **settings)
    with pytest.raises(ModelUnavailable) as raised:
        load_engine(folder, device="cpu")
    detail = raised.value.detail
    assert detail.startswith(f"{folder} is quantized with {settings['quant_method']}, for a GPU: ")
    assert reason in detail
    assert "\n" not in detail

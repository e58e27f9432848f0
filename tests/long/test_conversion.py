"""Conversions of a real language model, SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llm_sidecar.engines import GenerationRequest, load_engine
from llm_sidecar.hermes_plugin import chat_messages
from llm_sidecar.models.conversion import ConversionFailed, build, child, convert, pipeline
from tests.batches import hundred_proposals
from tests.real_transformers import smollm2_folder

MAX_MEMORY = 2.2
"""Bytes of peak memory above an idle process, for each byte of the source in bfloat16."""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of `convert --precision int4`."""
    out = tmp_path_factory.mktemp("converted") / "smollm2"
    began = time.monotonic()
    command = [sys.executable, "-m", "llm_sidecar.loader", "convert", str(smollm2), str(out)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"\n{shown}in {time.monotonic() - began:.0f} s")
    return out


def test_the_kept_result_is_as_good_as_the_source(converted: Path) -> None:
    record = json.loads((converted / "conversion.json").read_bytes())
    assert record["source"]["tokens"] >= 2000
    kept = record["trials"][-1]
    assert kept["refusal"] is None
    assert kept["quality"]["perplexity_ratio"] <= 1.05
    first = record["trials"][0]
    assert first["name"] == "int4, blocks of 32"
    assert first["refusal"] is not None


def test_hermes_answers_paris(converted: Path) -> None:
    engine = load_engine(converted, device="cpu", threads=2)
    chat = chat_messages("What is the capital of France?")
    answer = "".join(delta.text for delta in engine.stream(GenerationRequest(chat, 16)))
    assert "Paris" in answer


def test_a_hundred_proposals_of_the_kept_result_are_valid(converted: Path) -> None:
    assert len(hundred_proposals(load_engine(converted, device="cpu", threads=2))) == 100


def test_peak_memory_is_bounded(converted: Path, smollm2: Path) -> None:
    peaks = json.loads((converted / "conversion.json").read_bytes())["peak_memory_bytes"]
    size = sum(file.stat().st_size for file in smollm2.glob("*.safetensors"))
    builder = "import onnxruntime_genai.models.builder"
    source = "import llm_sidecar.models.conversion.source_engine"
    quantizer = "import llm_sidecar.models.conversion.quantizer"
    idle = {
        "building": child.run("idle", ["timeit", "-n", "1", "-r", "1", builder]),
        "measuring": child.run("idle", ["timeit", "-n", "1", "-r", "1", source]),
        "quantizing": child.run("idle", ["timeit", "-n", "1", "-r", "1", quantizer]),
    }
    above = {step: (peaks[step] - idle[step]) / size for step in idle}
    print(f"\nbytes above idle for each byte of the source: {above}")
    assert max(above.values()) <= MAX_MEMORY


def test_a_damaged_copy_is_refused(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(smollm2, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    swapped = {"5": "20", "20": "5"}
    weights = {}
    for name, tensor in load_file(file).items():
        parts = name.split(".")
        parts[2:3] = [swapped.get(part, part) for part in parts[2:3]]
        weights[".".join(parts)] = tensor
    save_file(weights, file, metadata={"format": "pt"})
    monkeypatch.setattr(pipeline, "build", lambda source, *rest: build(damaged, *rest))
    with pytest.raises(ConversionFailed, match="no result is good enough") as refused:
        convert(smollm2, tmp_path / "out", "int8")
    print(f"\n{refused.value.detail}")
    assert not (tmp_path / "out").exists()

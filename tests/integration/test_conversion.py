"""Conversion of a transformers folder for onnxruntime."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_sidecar import command_line
from llm_sidecar.engines import GenerationRequest, load_engine
from llm_sidecar.engines.lora_graph import read_lora_graph
from llm_sidecar.engines.ort import OrtEngine
from llm_sidecar.engines.torch import TorchEngine
from llm_sidecar.loader import __main__ as loader_cli
from llm_sidecar.models.conversion import ConversionFailed, convert
from llm_sidecar.models.conversion.all_logits import all_logits
from llm_sidecar.models.conversion.builder import build
from llm_sidecar.models.conversion.measure import measure_engine
from llm_sidecar.models.conversion.options import Option
from llm_sidecar.models.conversion.pruned_head import prune_head
from llm_sidecar.models.conversion.quality import compare
from llm_sidecar.models.conversion.quantizer import quantize_model
from llm_sidecar.models.conversion.source_engine import SourceEngine
from llm_sidecar.models.files import DEMO_DIR
from tests.live_server import is_running
from tests.random_models import convert_to_onnx


@pytest.fixture
def llama(random_hermes_torch: Path) -> Path:
    return random_hermes_torch


@pytest.fixture(scope="module")
def float32(random_hermes_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for onnxruntime, in float32."""
    return convert_to_onnx(random_hermes_torch, tmp_path_factory.mktemp("float32") / "m", "fp32")


@pytest.fixture
def replace_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a script the builder's program; the real one takes five seconds to import."""
    folder = tmp_path / "modules" / "onnxruntime_genai" / "models"

    def replace(script: str) -> None:
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder.parent / "__init__.py").touch()
        (folder / "builder.py").write_text(script)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    return replace


def ignore(line: str) -> None:
    """Nobody follows the progress."""


def test_a_converted_model_is_as_good_as_its_source_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = DEMO_DIR / "hermes", tmp_path / "deep" / "converted"
    assert loader_cli.main(["convert", str(source), str(out), "--precision", "int8"]) == 0
    shown = capsys.readouterr()
    said = shown.err.splitlines()
    assert said[0].startswith("Converting takes up to 740 MB of memory")
    assert {"Reading layer 1", "Measuring the source", "Trying int8, blocks of 32"} < set(said)
    record = json.loads((out / "conversion.json").read_bytes())
    (trial,) = record["trials"]
    assert record["kept"] == trial["name"] == "int8, blocks of 32"
    assert trial["quality"]["perplexity_ratio"] == pytest.approx(1.0, abs=0.03)
    assert trial["quality"]["equal_greedy"] >= 0.8
    assert shown.out.splitlines()[-1].startswith(f"{out} is converted. It is int8, blocks of 32")
    engine = load_engine(out, device="cpu")
    assert engine.runtime == "onnxruntime"
    *_, last = engine.stream(GenerationRequest([{"role": "user", "content": "Hi."}], 1))
    assert last.completion_tokens == 1
    assert list(out.parent.iterdir()) == [out]


def test_the_source_is_measured_as_in_float32(llama: Path, tmp_path: Path) -> None:
    stored = tmp_path / "bfloat16"
    shutil.copytree(llama, stored)
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(stored)
    exact, source = TorchEngine(stored, device="cpu"), SourceEngine(stored, threads=1)
    tokens = [7, 8, 9, 200]
    assert all_logits(source, tokens).tolist() == all_logits(exact, tokens).tolist()
    # Between two passes all weights are as they are stored.
    assert {weight.dtype for weight in source.model.parameters()} == {torch.bfloat16}


def test_models_of_other_weights_differ(
    llama: Path, float32: Path, random_phi3_torch: Path
) -> None:
    source = measure_engine(SourceEngine(llama, threads=1), ignore)
    assert source.tokens > 2000
    same = compare(source, measure_engine(OrtEngine(float32), ignore))
    assert same.perplexity_ratio == pytest.approx(1.0, abs=1e-4)
    assert same.equal_greedy > 0.99
    assert same.score_ranks == pytest.approx(1.0, abs=0.01)
    other = measure_engine(SourceEngine(random_phi3_torch, threads=1), ignore)
    assert other.text == source.text
    assert compare(source, other).equal_greedy < 0.1


def test_another_template_is_noticed(float32: Path, tmp_path: Path) -> None:
    other = shutil.copytree(float32, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\n"))
    first, second = (measure_engine(OrtEngine(folder), ignore) for folder in (float32, other))
    assert first.greedy == second.greedy
    assert first.text != second.text


@pytest.mark.parametrize(
    "option",
    [
        Option(4, 32, edge_bits=4),
        Option(4, 16, "search"),
        Option(8, 32),
        Option(4, 32, "search", 8, True),
    ],
    ids=lambda option: option.name,
)
def test_a_quantized_model_is_close_and_takes_adapters(
    float32: Path, tmp_path: Path, option: Option
) -> None:
    out = tmp_path / "quantized"
    quantize_model(float32, out, option)
    assert (out / "model.onnx.data").stat().st_size < (float32 / "model.onnx.data").stat().st_size
    tokens = list(range(100, 140))
    wide, narrow = (all_logits(OrtEngine(folder), tokens) for folder in (float32, out))
    assert np.corrcoef(wide.ravel(), narrow.ravel())[0, 1] > (0.99 if option.bits == 8 else 0.5)
    assert read_lora_graph(out / "model.onnx").projections.keys() == (
        read_lora_graph(float32 / "model.onnx").projections.keys()
    )


def test_a_pruned_graph_computes_the_logits_of_the_last_token(
    float32: Path, tmp_path: Path
) -> None:
    pruned = shutil.copytree(float32, tmp_path / "pruned")
    prune_head(pruned / "model.onnx")
    tokens = [7, 8, 9]
    whole, last = (all_logits(OrtEngine(folder), tokens) for folder in (float32, pruned))
    assert last.shape == (1, whole.shape[1])
    assert last[0] == pytest.approx(whole[2], abs=1e-4)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_conversion_leaves_nothing(
    llama: Path,
    tmp_path: Path,
    replace_builder: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    replace_builder(
        "import os, pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('-o') + 1])\n"
        "out.mkdir()\n"
        "(out / 'model.onnx').write_text('half of it')\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "print('Reading embedding layer', flush=True)\n"
        "time.sleep(600)\n"
    )

    def interrupted(line: str) -> None:
        if line == "Reading embedding layer":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(command_line, "say", interrupted)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    out = tmp_path / "out" / "converted"
    assert loader_cli.main(["convert", str(llama), str(out)]) == status
    assert list(out.parent.iterdir()) == []
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


def test_what_cannot_be_converted_is_said_in_a_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: Path, out: Path) -> str:
        assert loader_cli.main(["convert", str(source), str(out)]) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if "takes up to" not in line]
        assert len(said) == 1
        return said[0]

    assert "config.json" in refused(tmp_path / "nowhere", tmp_path / "out")
    assert "already exists" in refused(llama, llama)
    pickled = tmp_path / "pickled"
    shutil.copytree(llama, pickled)
    for weights in pickled.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    assert "safetensors" in refused(pickled, tmp_path / "out")
    (tmp_path / "file").touch()
    assert "file" in refused(llama, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_the_builders_own_complaint_is_passed_on(
    llama: Path, tmp_path: Path, replace_builder: Callable[[str], None]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    (broken / "config.json").write_text('{"architectures": ["Nothing"], "model_type": "llama"}')
    with pytest.raises(NotImplementedError, match=r"not currently supported") as complaint:
        convert_to_onnx(broken, tmp_path / "broken-out")
    replace_builder(f"raise NotImplementedError({str(complaint.value)!r})")
    said = f"the model builder failed: NotImplementedError: {complaint.value}"
    with pytest.raises(ConversionFailed) as failure:
        convert(llama, tmp_path / "out", "int4")
    assert str(failure.value) == said


def test_a_step_is_killed_before_other_processes_if_memory_runs_out(
    llama: Path, tmp_path: Path, replace_builder: Callable[[str], None]
) -> None:
    replace_builder("print('Reading', open('/proc/self/oom_score_adj').read())")
    said: list[str] = []
    build(llama, tmp_path / "out", "fp32", said.append)
    assert said == ["Reading 1000"]


def test_a_step_that_the_kernel_kills_ran_out_of_memory(
    llama: Path, tmp_path: Path, replace_builder: Callable[[str], None]
) -> None:
    replace_builder("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(ConversionFailed, match="most likely because memory ran out"):
        convert(llama, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()

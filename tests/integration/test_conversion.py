"""Conversion of a transformers folder for onnxruntime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_sidecar import command_line
from llm_sidecar.engines import GenerationRequest, load_engine
from llm_sidecar.loader import __main__ as loader_cli
from llm_sidecar.models import conversion
from llm_sidecar.models.conversion import ConversionFailed, compare, convert
from tests.live_server import is_running
from tests.random_models import convert_to_onnx, write_transformers_folder


@pytest.fixture
def llama(random_hermes_torch: Path) -> Path:
    return random_hermes_torch


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


def test_a_converted_model_agrees_with_its_original_and_runs(llama: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "deep" / "converted", list[str]()
    agreement = convert(llama, out, "fp32", said.append)
    assert len(agreement.distances) > 3
    assert agreement.mean < 0.001
    assert said[0] == "Reading embedding layer"
    assert "Reading layer 1" in said
    engine = load_engine(out, device="cpu")
    assert engine.runtime == "onnxruntime"
    chat = [{"role": "user", "content": "Hi."}]
    *_, last = engine.stream(GenerationRequest(chat, 5))
    assert last.completion_tokens == 5
    assert list(out.parent.iterdir()) == [out]


def test_a_model_that_comes_out_different_is_not_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_transformers_folder(tmp_path / "other", architecture="llama", seed=1)
    monkeypatch.setattr(
        conversion, "build", lambda source, out, *rest: convert_to_onnx(other, out, "fp32")
    )
    with pytest.raises(ConversionFailed, match="apart"):
        convert(llama, tmp_path / "out" / "converted", "fp32")
    assert list((tmp_path / "out").iterdir()) == []


def test_models_of_other_weights_are_far_apart(llama: Path, random_phi3_torch: Path) -> None:
    assert compare(llama, llama).mean == pytest.approx(0.0, abs=1e-6)
    assert compare(llama, random_phi3_torch).mean > max(conversion.MAX_DISTANCE.values())


def test_another_tokenizer_is_noticed(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\n"))
    with pytest.raises(ConversionFailed, match="splits text differently"):
        compare(llama, other)


def test_an_interrupted_conversion_leaves_nothing(
    llama: Path,
    tmp_path: Path,
    replace_builder: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
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
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "say", interrupted)
    out = tmp_path / "out" / "converted"
    assert loader_cli.main(["convert", str(llama), str(out)]) == 130
    assert list(out.parent.iterdir()) == []
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_what_cannot_be_converted_is_said_in_a_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: Path, out: Path) -> str:
        assert loader_cli.main(["convert", str(source), str(out)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

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

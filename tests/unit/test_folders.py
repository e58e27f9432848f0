"""Which folder a path means, in the layouts in which publishers offer models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models import files
from llm_sidecar.models.folders import model_folders
from llm_sidecar.settings import Settings

MICROSOFT = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"
SUBFOLDER = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"


def write_onnx(folder: Path, name: str = MICROSOFT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": {"context_length": 4096, "decoder": {"filename": name}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    for file in (name, f"{name}.data", "config.json", "configuration_phi3.py"):
        (folder / file).touch()
    return folder


def located(path: Path) -> files.ModelFiles:
    return files.locate_phi3(Settings.from_environ({"MICRO_LLM_MODEL_PATH": str(path)}))


def test_microsofts_folder_is_loaded_as_it_is(tmp_path: Path) -> None:
    folder = write_onnx(tmp_path / "cpu-int4-rtn-block-32-acc-level-4")
    for path in (folder, folder / MICROSOFT):
        assert located(path) == files.ModelFiles(f"phi3/{folder.name}", folder)


@pytest.mark.parametrize("exists", [True, False], ids=["another file", "no such file"])
def test_the_configuration_says_which_file_is_loaded(tmp_path: Path, exists: bool) -> None:
    folder = write_onnx(tmp_path / "phi3")
    if exists:
        (folder / "phi3.onnx").touch()
    note = f"genai_config.json names {MICROSOFT}, which is loaded instead of phi3.onnx"
    assert located(folder / "phi3.onnx") == files.ModelFiles("phi3/phi3", folder, (note,))
    settings = Settings.from_environ({"MICRO_LLM_MODEL_PATH": str(folder / "phi3.onnx")})
    assert files.phi3_model_file_exists(settings)
    (folder / MICROSOFT).unlink()
    assert files.phi3_model_file_exists(settings) == exists


def test_a_missing_file_beside_a_transformers_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelUnavailable, match=r"phi3\.onnx does not exist; set MICRO_LLM"):
        located(tmp_path / "phi3.onnx")


@pytest.mark.parametrize("with_config", [True, False])
def test_the_only_model_of_a_repository_is_taken(tmp_path: Path, with_config: bool) -> None:
    folder = write_onnx(tmp_path / SUBFOLDER)
    if with_config:
        # Microsoft's has one at the top too, without weights.
        (tmp_path / "config.json").write_text("{}")
    note = f"{tmp_path} holds one model, in {SUBFOLDER}"
    assert located(tmp_path) == files.ModelFiles(f"phi3/{folder.name}", folder, (note,))


def test_several_models_of_a_repository_are_named(tmp_path: Path) -> None:
    for name in ("cuda/cuda-int4", "cpu/int4", "cpu/int8"):
        write_onnx(tmp_path / name)
    with pytest.raises(ModelUnavailable) as caught:
        located(tmp_path)
    assert caught.value.detail == (
        f"The phi3 model is missing: {tmp_path} holds 3 models, in cpu/int4, cpu/int8, "
        "cuda/cuda-int4; set MICRO_LLM_MODEL_PATH to the model"
    )
    for number in range(4):
        write_onnx(tmp_path / f"d{number}")
    with pytest.raises(ModelUnavailable, match=r"7 models, in .*, d0, d1 and others; set"):
        located(tmp_path)


def test_weights_decide_for_the_folder_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_onnx(tmp_path / "onnx")
    assert model_folders(tmp_path) == [tmp_path / "onnx"]
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert model_folders(tmp_path) == [tmp_path]


def test_the_source_in_a_converted_model_is_no_model_of_its_own(tmp_path: Path) -> None:
    converted = write_onnx(tmp_path / "phi3-int4")
    source = tmp_path.parent / f"{tmp_path.name}-source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").touch()
    (converted / "transformers").symlink_to(source)
    assert model_folders(tmp_path) == [converted]


def test_hidden_and_deep_folders_are_not_searched(tmp_path: Path) -> None:
    write_onnx(tmp_path / ".cache")
    write_onnx(tmp_path / "a" / "b" / "c")
    assert model_folders(tmp_path) == []


def test_only_so_many_folders_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_onnx(tmp_path / "z")
    for number in range(250):
        (tmp_path / f"a{number}").mkdir()
    assert model_folders(tmp_path) == []


def test_the_context_of_phi3_ends_with_its_sliding_window(tmp_path: Path) -> None:
    folder = write_onnx(tmp_path)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["sliding_window"] = {"window_size": 2047}
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert files.phi3_context_length(Settings(models={"phi3_path": folder})) == 2047

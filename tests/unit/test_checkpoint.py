"""What a transformers folder says of itself before it is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from llm_sidecar.engines.checkpoint import check_packages, count_weights, quantization_method
from llm_sidecar.errors import ModelUnavailable


def write(folder: Path, quantized: object = None) -> Path:
    config: dict[str, object] = {"model_type": "llama"}
    if quantized is not None:
        config |= {"quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_weights(folder: Path, name: str, **shapes: list[int]) -> None:
    tensors = {key: {"dtype": "BF16", "shape": shape} for key, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        ("gptq", "optimum and gptqmodel"),
        ("awq", "gptqmodel"),
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_quantized_checkpoint_names_the_packages_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, missing: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable) as raised:
        check_packages(write(tmp_path, {"quant_method": method}))
    assert raised.value.detail == (
        f"{tmp_path} is quantized with {method}, for a GPU: install {missing}; "
        "or take the model's original weights, or a GGUF file of it"
    )


def test_only_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, {"quant_method": "gptq"})
    installed = {"optimum"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    with pytest.raises(ModelUnavailable, match=": install gptqmodel; or"):
        check_packages(folder)
    installed.add("gptqmodel")
    check_packages(folder)


def test_other_checkpoints_need_nothing_more(tmp_path: Path) -> None:
    check_packages(write(tmp_path))
    check_packages(write(tmp_path, {"quant_method": "a new one"}))
    assert quantization_method(tmp_path) == "a new one"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"quantization_config": 3}'])
def test_a_configuration_that_cannot_be_read_is_left_to_transformers(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert quantization_method(tmp_path) is None


def test_the_weights_of_all_files_count_once(tmp_path: Path) -> None:
    write_weights(tmp_path, "model-1-of-2.safetensors", embed=[10, 4], norm=[4])
    write_weights(tmp_path, "model-2-of-2.safetensors", head=[4, 4, 2])
    # A copy in another format, which transformers does not load.
    write_weights(tmp_path, "consolidated.safetensors", everything=[1000])
    index = {"embed": "model-1-of-2.safetensors", "norm": "model-1-of-2.safetensors"}
    index |= {"head": "model-2-of-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert count_weights(tmp_path) == 10 * 4 + 4 + 4 * 4 * 2


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write_weights(tmp_path, "model.safetensors", norm=[4], scale=[])
    assert count_weights(tmp_path) == 5


def test_a_file_of_another_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        count_weights(tmp_path)

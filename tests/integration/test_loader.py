"""The locations of models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_sidecar import loader
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models import files
from llm_sidecar.settings import Settings
from tests.live_server import ROOT


def settings(**environ: str) -> Settings:
    return Settings.from_environ(environ)


def test_phi3_may_be_named_by_its_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    (tmp_path / "phi3.onnx").write_text("")
    for path in (tmp_path, tmp_path / "phi3.onnx"):
        found = files.locate_phi3(settings(MICRO_LLM_MODEL_PATH=str(path)))
        assert found.folder == tmp_path
        assert found.label == f"phi3/{tmp_path.name}"


def test_hermes_is_a_transformers_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert files.locate_hermes(settings(HERMES_MODEL_PATH=str(tmp_path))).folder == tmp_path


@pytest.mark.parametrize("demo", ["true", "false"])
def test_a_configured_model_that_is_missing_is_never_replaced(tmp_path: Path, demo: str) -> None:
    environ = {"MICRO_LLM_MODEL_PATH": str(tmp_path / "gone.onnx"), "SIDECAR_DEMO": demo}
    with pytest.raises(ModelUnavailable, match="MICRO_LLM_MODEL_PATH") as caught:
        files.locate_phi3(settings(**environ))
    assert caught.value.retry_after


def test_a_file_without_its_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "phi3.onnx").write_text("")
    with pytest.raises(ModelUnavailable, match=r"holds no genai_config.json or config.json"):
        files.locate_phi3(settings(MICRO_LLM_MODEL_PATH=str(tmp_path / "phi3.onnx")))


def test_without_a_model_and_without_the_demo_the_variable_is_named() -> None:
    with pytest.raises(ModelUnavailable, match=r"set HERMES_MODEL_PATH to the model, or SIDECAR_D"):
        files.locate_hermes(settings())


def test_the_demo_stands_in_where_no_model_is_configured() -> None:
    asked = settings(SIDECAR_DEMO="true")
    assert files.locate_phi3(asked).label == "phi3/demo"
    assert files.locate_hermes(asked).label == "hermes/demo"
    assert files.phi3_model_file(asked).exists()


def test_only_the_demo_model_is_shown_no_examples_unless_asked() -> None:
    assert files.few_shot_examples(settings(SIDECAR_DEMO="true")) == 0
    assert files.few_shot_examples(settings(SIDECAR_DEMO="true", FEW_SHOT_EXAMPLES="2")) == 2
    assert files.few_shot_examples(settings()) == 3
    configured = {"SIDECAR_DEMO": "true", "MICRO_LLM_MODEL_PATH": "/models/phi3"}
    assert files.few_shot_examples(settings(**configured)) == 3
    assert files.few_shot_examples(settings(**configured, FEW_SHOT_EXAMPLES="0")) == 0


def test_an_empty_mount_point_is_no_model_but_a_folder_with_anything_in_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "DEFAULT_HERMES", tmp_path)
    asked = settings(SIDECAR_DEMO="true")
    assert files.locate_hermes(asked).label == "hermes/demo"
    with pytest.raises(ModelUnavailable, match="HERMES_MODEL_PATH"):
        files.locate_hermes(settings())
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelUnavailable, match=r"no genai_config\.json .* to the model$"):
        files.locate_hermes(asked)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            {"genai_config.json": '{"model": {"context_length": 131072}}', "config.json": "{"},
            131072,
        ),
        ({"config.json": '{"max_position_embeddings": 8192}'}, 8192),
        ({"config.json": "{}"}, 4096),
        ({"genai_config.json": "no json"}, 4096),
        ({"genai_config.json": '["model"]'}, 4096),
        ({}, 4096),
    ],
)
def test_phi3s_context_is_what_its_configuration_says_or_that_of_the_smallest(
    tmp_path: Path, written: dict[str, str], expected: int
) -> None:
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    assert files.phi3_context_length(Settings(models={"phi3_path": tmp_path})) == expected


def test_the_getters_of_a_gguf_model_say_that_it_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = SimpleNamespace(runtime="llama.cpp")
    monkeypatch.setattr(loader, "get_hermes_engine", lambda: elsewhere)
    with pytest.raises(ModelUnavailable, match="in another process; use get_hermes_engine"):
        loader.get_hermes_model_and_tokenizer()


def test_getters_load_once_and_keep_a_tokenizer_that_no_text_ends(
    random_models: dict[str, str],
) -> None:
    script = """
from llm_sidecar import loader
first, second = loader.get_phi3_model_and_tokenizer(), loader.get_phi3_model_and_tokenizer()
assert first[0] is second[0] and first[1] is second[1]
assert loader.get_hermes_model_and_tokenizer()[0] is not first[0]
text = chr(0x4fa1) * 9000 + chr(0) + "x"
assert first[1].decode(first[1].encode(text).ids) == text
"""
    command = [sys.executable, "-c", script]
    environ = random_models | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environ, check=False).returncode == 0

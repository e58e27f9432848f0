"""Paths of GGUF models."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.files import (
    ModelFiles,
    locate_hermes,
    phi3_context_length,
    phi3_model_file_exists,
)
from llm_sidecar.settings import Settings


def hermes_at(path: Path) -> ModelFiles:
    return locate_hermes(Settings(models={"hermes_path": path}))


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "Hermes 3.Q4_K_M.gguf"
    path.touch()
    # The configuration of the model that it was made from is often beside it.
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 131072}')
    assert hermes_at(path) == ModelFiles("hermes/Hermes%203.Q4_K_M", tmp_path, (), path)
    assert hermes_at(path).model == path


def test_the_one_file_of_a_folder_is_taken(tmp_path: Path) -> None:
    for part in range(1, 4):
        (tmp_path / f"h-{part:05}-of-00003.gguf").touch()
    assert hermes_at(tmp_path).model == tmp_path / "h-00001-of-00003.gguf"


def test_a_folder_and_a_link_without_a_file_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "h.gguf").touch()
    (tmp_path / "other.gguf").mkdir()
    (tmp_path / "half.gguf").symlink_to("missing")
    assert hermes_at(tmp_path).model == tmp_path / "h.gguf"


def test_several_files_are_named(tmp_path: Path) -> None:
    for name in ("h.Q8_0", "h.Q4_0"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ModelUnavailable, match=r"holds 2 models, in h\.Q4_0\.gguf, h\.Q8_0\.gguf"):
        hermes_at(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"h\.gguf does not exist; set HERMES_MODEL_PATH"):
        hermes_at(tmp_path / "h.gguf")


def test_phi3_in_a_gguf_file_exists_and_has_the_smallest_context(tmp_path: Path) -> None:
    path = tmp_path / "phi3.gguf"
    path.touch()
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 131072}')
    settings = Settings(models={"phi3_path": path})
    assert phi3_model_file_exists(settings)
    assert phi3_context_length(settings) == 4096


def test_the_file_of_a_folder_counts_as_phi3_s(tmp_path: Path) -> None:
    (tmp_path / "phi3.gguf").touch()
    assert phi3_model_file_exists(Settings(models={"phi3_path": tmp_path}))

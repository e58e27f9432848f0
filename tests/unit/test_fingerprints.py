"""Fingerprints of a model's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.models.local import fingerprints
from llm_sidecar.models.local.fingerprints import fingerprint, fingerprints_of


def written(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_equal_files_have_equal_fingerprints_in_any_folder(tmp_path: Path) -> None:
    one = written(tmp_path / "one", a=b"1", b=b"2")
    two = written(tmp_path / "two", b=b"2", a=b"1")
    ours, theirs = (fingerprint([folder / "b", folder / "a"]) for folder in (one, two))
    assert ours == theirs == fingerprint([two / "a", two / "b"])
    assert len(ours) == 64


@pytest.mark.parametrize(
    "files", [{"a": b"1", "b": b"3"}, {"a": b"1", "c": b"2"}, {"a": b"12", "b": b""}, {"a": b"1"}]
)
def test_another_content_name_or_division_has_another(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    one = fingerprint(written(tmp_path / "one", a=b"1", b=b"2").iterdir())
    assert fingerprint(written(tmp_path / "two", **files).iterdir()) != one


@pytest.mark.parametrize(("position", "differs"), [(0, True), (5, False), (7, True), (14, True)])
def test_the_fingerprint_of_a_large_file_covers_evenly_spaced_blocks(
    position: int, differs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_BLOCK", 3)
    monkeypatch.setattr(fingerprints, "_BLOCKS", 3)
    # The blocks begin at 0, 6 and 12.
    content = bytearray(b"abcdefghijklmno")
    before = fingerprint([written(tmp_path, large=bytes(content)) / "large"])
    content[position] = 0
    after = fingerprint([written(tmp_path, large=bytes(content)) / "large"])
    assert (before != after) is differs


def test_the_fingerprint_of_a_file_of_64_mib_covers_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_BLOCK", 3)
    monkeypatch.setattr(fingerprints, "_BLOCKS", 3)
    found = {
        fingerprint([written(tmp_path, small=b"abcdefghi"[:n] + b"0" * (9 - n)) / "small"])
        for n in range(9)
    }
    assert len(found) == 9


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ("model__onnx", "model"),
        ("model__onnx__data", "model"),
        ("genai_config__json", "model"),
        ("generation_config__json", "model"),
        ("tokenizer__json", "tokenizer"),
        ("chat_template__jinja", "tokenizer"),
        ("README__md", ""),
        ("model__safetensors", ""),
    ],
)
def test_the_fingerprint_of_an_onnx_model_covers_its_files(
    changed: str, parts: str, tmp_path: Path
) -> None:
    names = ("model__onnx", "genai_config__json", "tokenizer__json")
    folder = written(tmp_path, **dict.fromkeys(names, b"1"))
    before = fingerprints_of(folder, None)
    after = fingerprints_of(written(folder, **{changed: b"2"}), None)
    differ = [
        name for name, one, other in zip(before._fields, before, after, strict=True) if one != other
    ]
    assert differ == ([parts] if parts else [])
    assert before.adapter is None


def test_the_fingerprint_of_a_transformers_model_covers_its_weights(tmp_path: Path) -> None:
    folder = written(tmp_path, config__json=b"1", model__safetensors=b"1")
    before = fingerprints_of(folder, None)
    after = fingerprints_of(written(folder, model__safetensors=b"2"), None)
    assert before.model != after.model


def test_the_fingerprint_of_a_gguf_model_covers_its_sampling(tmp_path: Path) -> None:
    file = written(tmp_path, hermes__gguf=b"1", config__json=b"1") / "hermes.gguf"
    before = fingerprints_of(file, None)
    written(tmp_path, config__json=b"2")
    assert fingerprints_of(file, None) == before
    written(tmp_path, generation_config__json=b"1")
    assert fingerprints_of(file, None).model != before.model


def test_an_adapter_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    model = written(tmp_path / "model", config__json=b"1")
    one = written(tmp_path / "20260101", adapter_model__safetensors=b"1")
    two = written(tmp_path / "20260102", adapter_model__safetensors=b"2")
    first, second = fingerprints_of(model, one), fingerprints_of(model, two)
    assert first.model == second.model
    assert first.adapter != second.adapter

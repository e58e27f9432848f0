"""What a conversion needs, and what a machine has free."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_sidecar.models.conversion import ConversionFailed, resources
from llm_sidecar.models.conversion.resources import Needs, Weights, check, needs_of, read_weights
from tests.unit.test_conversion import write_safetensors


def test_too_little_memory_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 8 << 30)
    with pytest.raises(ConversionFailed) as failure:
        check(Needs(memory=9 << 30, disk=0), tmp_path)
    assert failure.value.detail == (
        "converting takes 9.7 GB of memory, and 8.6 GB are free; convert on a machine with more, "
        "or serve a GGUF of the model, which needs no conversion"
    )
    check(Needs(memory=8 << 30, disk=0), tmp_path)
    # Where the system does not say, memory is not checked.
    monkeypatch.setattr(resources, "free_memory", lambda: None)
    check(Needs(memory=1 << 60, disk=0), tmp_path)


def test_too_little_disk_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=500, f_frsize=4096))
    check(Needs(memory=0, disk=500 * 4096), tmp_path)
    with pytest.raises(ConversionFailed) as failure:
        check(Needs(memory=0, disk=3_000_000_000), tmp_path)
    assert failure.value.detail == (
        f"converting takes 3.0 GB of disk under {tmp_path}, and 2 MB are free; name a folder on "
        "a larger disk, or serve a GGUF of the model, which needs no conversion"
    )


def test_the_weights_are_counted_from_the_headers(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "1.safetensors", {"a": [3, 5], "b": [7]})
    write_safetensors(tmp_path / "2.safetensors", {"c": []})
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    places = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    # A second copy, as Mistral's folders have it.
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": [3, 5], "b": [7], "c": []})
    assert read_weights(tmp_path) == Weights(size, count=23, largest=15)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(ConversionFailed, match=r"2\.safetensors is missing$"):
        read_weights(tmp_path)


def test_a_download_that_was_cut_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"a": [3, 5]})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConversionFailed, match="incomplete"):
        read_weights(tmp_path)


def test_the_needs_grow_with_the_model() -> None:
    weights = Weights(size=2000, count=1000, largest=100)
    float32, int4 = needs_of(weights, "fp32"), needs_of(weights, "int4")
    assert float32.memory == int4.memory == (700 << 20) + 2000 + 1200
    assert float32.disk == 4400
    assert int4.disk == 4400 + 2500

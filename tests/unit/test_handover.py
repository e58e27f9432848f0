"""When torch does the prefill of a model on onnxruntime."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from llm_sidecar.engines import handover
from llm_sidecar.engines.base import PrefillDtype
from llm_sidecar.errors import ModelUnavailable

GB = 10**9


class Machine:
    """What the machine has, and whether the model was handed over."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.tiles = True
        self.free: int | None = 6 * GB
        self.weights = 2 * GB
        self.mismatch: str | None = None
        self.loads = 0
        monkeypatch.setattr(handover, "multiplies_bfloat16_in_tiles", lambda: self.tiles)
        monkeypatch.setattr(handover, "free_memory", lambda: self.free)
        monkeypatch.setattr(handover, "count_weights", lambda folder: self.weights)
        monkeypatch.setattr(handover, "_load", self._load)
        (folder / "transformers").mkdir()
        (folder / "transformers" / "config.json").write_text("{}")

    def _load(self, *arguments: object) -> str | None:
        self.loads += 1
        return self.mismatch

    def hands_over(self, dtype: PrefillDtype) -> bool:
        before = self.loads
        handover.hand_over(cast(Any, None), self.folder, dtype, 1)
        return self.loads > before


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_it_does_where_the_processor_has_amx_and_the_memory_is_free(machine: Machine) -> None:
    assert machine.hands_over("auto")


def test_it_does_not_where_it_is_switched_off(machine: Machine) -> None:
    assert not machine.hands_over("off")


def test_without_a_transformers_folder_it_does_not(machine: Machine) -> None:
    (machine.folder / "transformers").rename(machine.folder / "elsewhere")
    assert not machine.hands_over("auto")
    assert not machine.hands_over("bfloat16")


def test_a_link_whose_folder_is_gone_is_named(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    link = machine.folder / "transformers"
    link.rename(machine.folder / "elsewhere")
    link.symlink_to("/nowhere")
    with caplog.at_level(logging.INFO):
        assert not machine.hands_over("auto")
    reason = "it is a link to /nowhere, where there is no folder"
    assert caplog.messages[-1].endswith(reason)
    with pytest.raises(ModelUnavailable, match=f"{reason}$"):
        machine.hands_over("bfloat16")


def test_a_link_to_the_folder_is_enough(machine: Machine) -> None:
    (machine.folder / "transformers").rename(machine.folder / "elsewhere")
    (machine.folder / "transformers").symlink_to(machine.folder / "elsewhere")
    assert machine.hands_over("auto")


def test_without_amx_it_does_only_if_it_is_set(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.tiles = False
    with caplog.at_level(logging.INFO):
        assert not machine.hands_over("auto")
    assert "this processor has no AMX" in caplog.messages[-1]
    assert machine.hands_over("bfloat16")


def test_the_weights_in_bfloat16_and_a_gigabyte_must_be_free(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.free = 2 * 2 * GB + (1 << 30)
    assert machine.hands_over("auto")
    machine.free -= 1
    with caplog.at_level(logging.INFO):
        assert not machine.hands_over("auto")
    assert caplog.messages[-1].endswith("it needs 5.1 GB of memory, and 5.1 GB are free")
    assert machine.hands_over("bfloat16")
    # Where the system does not say how much is free.
    machine.free = None
    assert machine.hands_over("auto")


def test_a_model_that_does_not_fit_is_an_error_only_if_it_was_asked_for(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.mismatch = "it is a model of another shape"
    with caplog.at_level(logging.INFO):
        assert machine.hands_over("auto")
    assert caplog.messages[-1].endswith("it is a model of another shape")
    with pytest.raises(ModelUnavailable) as raised:
        machine.hands_over("bfloat16")
    assert raised.value.detail == (
        f"PREFILL_DTYPE=bfloat16 cannot use {machine.folder / 'transformers'}: "
        "it is a model of another shape"
    )


def test_quantized_weights_are_not_used(machine: Machine) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    (machine.folder / "transformers" / "config.json").write_text(json.dumps(config))
    assert not machine.hands_over("auto")
    with pytest.raises(ModelUnavailable, match=r"its weights are quantized with gptq$"):
        machine.hands_over("bfloat16")


def test_weights_that_cannot_be_counted_are_not_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> int:
        raise ValueError("no safetensors file")

    monkeypatch.setattr(handover, "count_weights", fail)
    assert not machine.hands_over("auto")

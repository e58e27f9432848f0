"""The name of the adapter that was in use last, in a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter


def test_an_adapter_that_no_longer_exists_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "adapters" / "20260101"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").touch()
    state = AdapterState(tmp_path / "log", folder.parent)
    assert state.load() is None
    assert caplog.messages == []
    state.save(Adapter(folder))
    assert state.load() == Adapter(folder)
    shutil.rmtree(folder)
    assert state.load() is None
    assert "20260101" in caplog.text
    state.save(None)
    caplog.clear()
    assert state.load() is None
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["../adapters/20260101", "/", "20260101\0", "x" * 5000, "é"])
def test_what_is_no_name_leads_nowhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapters" / "20260101"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").touch()
    (tmp_path / "phi3_adapter").write_bytes(name.encode("latin-1"))
    assert AdapterState(tmp_path, folder.parent).load() is None


def test_a_file_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    AdapterState(tmp_path / "file", tmp_path).save(Adapter(tmp_path / "20260101"))
    assert "is not saved" in caplog.text

"""What the loader of workers knows of a model's files."""

from __future__ import annotations

from pathlib import Path

from llm_sidecar.engines import EngineOptions
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.loader import WorkerLoader


def test_file_stats_change_with_a_file_beside_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    loader = WorkerLoader("hermes", lambda: ModelFiles("hermes/m", tmp_path), EngineOptions(), 1.0)
    (tmp_path / "transformers").symlink_to(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{")
    before = loader.file_stats(None)
    assert loader.file_stats(None) == before
    (tmp_path / "config.json").write_text("{}")
    assert loader.file_stats(None) != before

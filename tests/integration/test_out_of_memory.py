"""The process that the kernel kills when memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.models.local import out_of_memory
from llm_sidecar.models.local.out_of_memory import ended_first

SCORE = Path("/proc/self/oom_score_adj")


def test_a_process_is_the_first_for_as_long_as_it_says() -> None:
    before = SCORE.read_text()
    with pytest.raises(ZeroDivisionError), ended_first():
        assert SCORE.read_text() == "1000\n"
        raise ZeroDivisionError
    assert SCORE.read_text() == before


def test_a_kernel_without_scores_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(out_of_memory, "_SCORE", tmp_path / "none")
    with ended_first():
        pass
    assert list(tmp_path.iterdir()) == []

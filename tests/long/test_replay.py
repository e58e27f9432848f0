"""Replays of a hundred proposals that were generated in batches have the same texts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.replays import DEMO, replayed, stored


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_hundred_proposals_are_the_same_texts(
    temperature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"PHI3_TEMPERATURE": temperature, "HERMES_TEMPERATURE": temperature}
    environ = DEMO | sampling | {"LANCEDB_URI": str(tmp_path / "lancedb")}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    names = asyncio.run(stored(tmp_path, 100, **sampling))
    reports = asyncio.run(replayed(names))
    assert [report.differences for report in reports] == [[]] * 100
    same = [{what: result.same for what, result in report.results.items()} for report in reports]
    assert same == [{"proposal": True, "critique": True, "score": True}] * 100
    errors = [
        abs(float(result.then) - float(result.now))
        for report in reports
        if (result := report.results["score"])
    ]
    print(f"scores differ by at most {max(errors):.1e}")

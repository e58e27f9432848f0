"""Long series of kills and power losses: every acknowledged row is stored once."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.test_db_crash import crash


def test_fifty_kills_lose_and_duplicate_no_acknowledged_row(tmp_path: Path) -> None:
    found = crash("kills", tmp_path / "db", 50)
    assert found["rows"] > 1000


def test_ten_power_losses_lose_and_duplicate_no_acknowledged_row(tmp_path: Path) -> None:
    found = crash("power", tmp_path / "db", 10)
    assert found["rows"] > 200
    # Otherwise no file that was not synced was damaged, and the test shows nothing.
    assert found["set_aside"] > 0


def test_four_processes_at_once_lose_and_duplicate_no_row(tmp_path: Path) -> None:
    seconds = float(os.environ.get("DB_TEST_SECONDS", "4"))
    found = crash("concurrent", tmp_path / "db", seconds)
    assert found["rows"] > 1000

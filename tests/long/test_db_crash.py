"""Long series of kills and power losses: everything acknowledged is stored once."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.test_db_crash import crash


def test_a_hundred_kills_neither_lose_nor_duplicate_data(tmp_path: Path) -> None:
    found = crash("kills", tmp_path / "db", 100)
    assert found["rows"] > 2000


def test_fifty_power_losses_neither_lose_nor_duplicate_data(tmp_path: Path) -> None:
    found = crash("power", tmp_path / "db", 50)
    assert found["rows"] > 500
    # If everything was synced, the test proves nothing.
    assert found["undone"] > 50


def test_four_processes_neither_lose_nor_duplicate_data(tmp_path: Path) -> None:
    seconds = float(os.environ.get("DB_TEST_SECONDS", "30"))
    found = crash("concurrent", tmp_path / "db", seconds)
    assert found["rows"] > 1000

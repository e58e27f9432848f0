"""Kills and power losses: every acknowledged row is stored once. `tests/long` has long series."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CRASHER = ROOT / "tests" / "db_crasher.py"


def crash(what: str, folder: Path, amount: float) -> dict[str, Any]:
    """Runs `tests/db_crasher.py`; fails with its message if one of its checks fails."""
    done = subprocess.run(
        [sys.executable, str(CRASHER), what, str(folder), str(amount), "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_killed_writers_lose_and_duplicate_no_acknowledged_row(tmp_path: Path) -> None:
    found = crash("kills", tmp_path / "db", 5)
    assert found["kills"] == 5
    assert found["rows"] > 0


def test_power_losses_lose_and_duplicate_no_acknowledged_row(tmp_path: Path) -> None:
    found = crash("power", tmp_path / "db", 3)
    assert found["losses"] >= 3
    assert found["rows"] > 0
    # Otherwise no file that was not synced was damaged, and the test shows nothing.
    assert found["set_aside"] > 0


def test_four_processes_at_once_lose_and_duplicate_no_row(tmp_path: Path) -> None:
    found = crash("concurrent", tmp_path / "db", 0.5)
    assert found["processes"] == 4
    assert found["rows"] > 0

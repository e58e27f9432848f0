"""What a database holds after its writers were killed, or the power failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CRASHER = ROOT / "tests" / "db_crasher.py"


def crash(what: str, folder: Path, amount: float) -> dict[str, Any]:
    """Runs one of the crasher's games; a failed check of it fails the test, with its reason."""
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


def test_fifty_kills_lose_and_double_no_acknowledged_row(tmp_path: Path) -> None:
    found = crash("kills", tmp_path / "db", 50)
    assert found["rows"] > 1000


def test_power_losses_lose_and_double_no_acknowledged_row(tmp_path: Path) -> None:
    found = crash("power", tmp_path / "db", 10)
    assert found["rows"] > 200
    # Otherwise nothing unsynced was hit, and the test shows nothing.
    assert found["set_aside"] > 0


@pytest.mark.parametrize("seconds", [float(os.environ.get("DB_TEST_SECONDS", "4"))])
def test_four_processes_at_once_lose_and_double_no_row(tmp_path: Path, seconds: float) -> None:
    found = crash("together", tmp_path / "db", seconds)
    assert found["rows"] > 1000

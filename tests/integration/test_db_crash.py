"""After kills and power losses, everything acknowledged is stored once. `tests/long` has long
series."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import power_loss

ROOT = Path(__file__).resolve().parents[2]
CRASHER = ROOT / "tests" / "db_crasher.py"


def crash(what: str, folder: Path, amount: float, seed: int = 1) -> dict[str, Any]:
    """Runs `tests/db_crasher.py`; fails with its message if one of its checks fails."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    if what == "power":
        environ["LD_PRELOAD"] = str(power_loss.build(folder.parent))
    done = subprocess.run(
        [sys.executable, str(CRASHER), what, str(folder), str(amount), str(seed)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_kills_neither_lose_nor_duplicate_acknowledged_data(tmp_path: Path) -> None:
    found = crash("kills", tmp_path / "db", 5)
    assert found["kills"] == 5
    assert found["rows"] > 0


def test_power_losses_neither_lose_nor_duplicate_acknowledged_data(tmp_path: Path) -> None:
    found = crash("power", tmp_path / "db", 3)
    assert found["losses"] == 3
    assert found["rows"] > 0
    # If everything was synced, the test proves nothing.
    assert found["undone"] > 0


def test_four_processes_neither_lose_nor_duplicate_data(tmp_path: Path) -> None:
    found = crash("concurrent", tmp_path / "db", 0.5)
    assert found["processes"] == 4
    assert found["rows"] > 0

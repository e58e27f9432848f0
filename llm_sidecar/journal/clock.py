"""The clock of a journal: it counts seconds while the machine is on, and all processes share it.

The ages of rows, events and requests are measured by it, so setting the system's clock expires
nothing. The journal stores the last reading, because `CLOCK_BOOTTIME` starts at 0 with every boot.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Clock:
    """The clock of one journal; all processes of one boot read the same time."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """Continues the clock of the journal.

        Args:
            db: inside a transaction.
        """
        self._boot = _BOOT_ID.read_text().strip()
        stored = db.execute("SELECT value FROM meta WHERE name = 'clock'").fetchone()
        boot, offset, last = json.loads(stored[0]) if stored else ("", 0.0, 0.0)
        if boot != self._boot:
            offset = last - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._offset = float(offset)
        self.save(db)

    def now(self) -> float:
        """Seconds since the journal was created, without the time that the machine was off."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self._offset

    def save(self, db: sqlite3.Connection) -> None:
        """Stores the time for the next boot; called every minute."""
        value = json.dumps([self._boot, self._offset, self.now()])
        db.execute("INSERT OR REPLACE INTO meta VALUES ('clock', ?)", [value])

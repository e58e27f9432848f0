"""Writes a write-ahead log as versions before the journal did."""

from __future__ import annotations

import datetime
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def record(table: str, values: Mapping[str, Any]) -> bytes:
    """A row as a record: marker, length, CRC-32, JSON."""
    shown = {
        name: value.isoformat() if isinstance(value, datetime.datetime) else value
        for name, value in values.items()
    }
    payload = json.dumps([table, shown], ensure_ascii=False, separators=(",", ":")).encode()
    return struct.pack("<4sII", b"\xf5ROW", len(payload), zlib.crc32(payload)) + payload


def write_old_log(logs: Path, *segments: bytes, name: str = "0123456789abcdef") -> Path:
    """The log of a process that has ended; returns its folder."""
    folder = logs / name
    folder.mkdir(parents=True)
    (logs / "lock").touch()
    (folder / "lock").touch()
    for number, content in enumerate(segments, 1):
        (folder / f"{number:08d}.log").write_bytes(content)
    return folder

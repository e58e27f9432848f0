"""Finds committed transactions that SQLite ignores in a damaged `-wal` file.

SQLite reads the file up to the first frame that is not valid, and says nothing about the rest
(https://sqlite.org/walformat.html). That is right for frames of a transaction that a crash cut off:
none of them is a commit frame, because SQLite writes it last. So a valid commit frame that follows
an invalid frame belongs to a transaction that is lost. After a power loss it may also belong to the
transaction that was being synced, which nobody has acknowledged.

What this cannot find: damage in the last transaction, and a file that is cut off. Both look like a
transaction that never ended.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

_MAGIC: Final = {0x377F0682: "<", 0x377F0683: ">"}
"""The byte order of the checksummed words, by the first number of the file."""
_HEADER: Final = 32
_FRAME_HEADER: Final = 24
_MASK: Final = 0xFFFFFFFF

_Sums = tuple[int, int]


def damage(path: Path) -> str | None:
    """What SQLite ignores in this file, in words; None if it ignores no commit that can be found.

    The answer holds only if no process writes to the file meanwhile.

    Raises:
        OSError
    """
    try:
        with path.open("rb") as file:
            return _damage(file)
    except FileNotFoundError:
        return None


def _damage(file: BinaryIO) -> str | None:
    header = file.read(_HEADER)
    if not any(header):
        # A power loss may leave zeros in place of a header that was not synced, but then no frame.
        return "its header cannot be read" if file.read(1) else None
    order = _MAGIC.get(int.from_bytes(header[:4], "big"))
    sums = None if order is None or len(header) < _HEADER else _checksum(header[:24], order, (0, 0))
    if order is None or sums is None or sums != _stored(header[24:]):
        return "its header cannot be read"
    size = _FRAME_HEADER + int.from_bytes(header[8:12], "big")
    number, first_invalid = 0, None
    while len(frame := file.read(size)) == size:
        number += 1
        is_of_this_log = frame[8:16] == header[16:24]
        checked = frame[:8] + frame[_FRAME_HEADER:]
        if not is_of_this_log or _checksum(checked, order, sums) != _stored(frame[16:24]):
            first_invalid = first_invalid or number
        elif first_invalid is not None and any(frame[4:8]):
            return f"a commit follows frame {first_invalid}, which cannot be read"
        # Each checksum starts from that of the frame before.
        sums = _stored(frame[16:24])
    return None


def _stored(data: bytes) -> _Sums:
    first, second = struct.unpack(">2I", data)
    return first, second


def _checksum(data: bytes, order: str, sums: _Sums) -> _Sums:
    """Continues a checksum; see section 4.2, "Checksum Algorithm"."""
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for one, two in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & _MASK
        second = (second + two + first) & _MASK
    return first, second

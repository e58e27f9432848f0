"""Imitates power losses: what a process wrote but did not sync may be lost, in part or as a whole.

`build` makes a library to preload, which records how to undo what is not synced. After a kill,
`lose_power` undoes a random part of it:

- of each file, one of: all that is not synced is kept; it is dropped; the file is cut somewhere
  after its synced size; it is zeros from there on; or each page is either old or new.
- of the changes of directories (create, link, rename, unlink, mkdir), the last ones, as many as
  chance decides. A change that was followed by an fsync of its directory stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_SOURCE: Final = Path(__file__).with_name("power_loss.c")
_PAGE: Final = 4096
_HEAD: Final = struct.Struct("<4Q")


class _Replaced(NamedTuple):
    """The bytes that a write replaced."""

    offset: int
    old: bytes
    size: int
    """of the file before it"""


def build(folder: Path) -> Path:
    """Compiles the library to preload."""
    library = folder / "power_loss.so"
    compiler = shutil.which("cc")
    assert compiler, "There is no C compiler: install gcc and libc6-dev."
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run([*command, "-lpthread"], check=True)
    return library


def start(folder: Path, undo: Path) -> None:
    """Begins to record in this process, which has the library preloaded.

    Args:
        folder: what is recorded; links in its path are resolved.
        undo: where, on the same file system.
    """
    undo.mkdir(exist_ok=True)
    library = ctypes.CDLL(None)
    library.power_start(os.fsencode(folder.resolve()), os.fsencode(undo.resolve()))


def lose_power(folder: Path, undo: Path, rng: random.Random, before: set[Path]) -> int:
    """Undoes changes that the recorded process has not synced; returns their number.

    Args:
        before: what was in the folder when the recording began.
    """
    ops = (undo / "ops").read_text().splitlines()
    changes = _unsynced(_renamed(ops, set(folder.resolve().rglob("*")) - before))
    undone = sum(_lose_writes(path, undo, rng) for path in sorted(folder.rglob("*")))
    # A journal file system loses the last changes of directories, not some in the middle.
    lost = changes[rng.randint(0, len(changes)) :]
    for change in reversed(lost):
        _undo_change(change, undo)
    shutil.rmtree(undo)
    return undone + len(lost)


def _renamed(ops: list[str], new: set[Path]) -> list[str]:
    """The changes, in which a file that was renamed unseen is created with its last name.

    lancedb writes small files under another name and renames them by a system call of its own,
    which no library sees.

    Args:
        new: what appeared since the recording began.
    """
    recorded = {Path(line.split("\t")[2]) for line in ops if line[0] in "CMR"}
    names = {str(path.stat().st_ino): str(path) for path in new - recorded}
    found = []
    for line in ops:
        kind, folder, *rest = line.split("\t")
        if kind == "C" and len(rest) > 1 and rest[1] in names:
            rest[0] = names.pop(rest[1])
        found.append("\t".join((kind, folder, *rest)))
    # The kill may come between a change and its record.
    assert len(names) <= 1, f"they appeared unseen: {sorted(names.values())[:5]}"
    return found


def _unsynced(ops: list[str]) -> list[list[str]]:
    """The changes of directories that are not synced, oldest first."""
    changes: list[list[str]] = []
    for line in ops:
        kind, folder, *rest = line.split("\t")
        if kind == "S":
            changes = [change for change in changes if change[1] != folder]
        else:
            changes.append([kind, folder, *rest])
    return changes


def _undo_change(change: list[str], undo: Path) -> None:
    kind, _, path, *rest = change
    # An earlier change of the same entry may have left it in another state.
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        if kind == "C":
            Path(path).unlink()
        elif kind == "M":
            shutil.rmtree(path)
        elif kind == "K":
            Path(path).mkdir()
        elif kind == "D":
            Path(path).hardlink_to(undo / rest[0])
        else:
            Path(path).rename(rest[0])
            Path(path).hardlink_to(undo / rest[1])


def _lose_writes(path: Path, undo: Path, rng: random.Random) -> int:
    """Loses some of the writes to a file; returns whether it did."""
    if not path.is_file() or path.name.endswith("-shm"):
        return 0
    log = undo / f"f{path.stat().st_ino}"
    if not log.exists():
        return 0
    new = path.read_bytes()
    old = bytearray(new)
    for replaced in reversed(list(_replaced(log.read_bytes()))):
        old[replaced.offset : replaced.offset + len(replaced.old)] = replaced.old
        old = old[: replaced.size] + bytes(max(0, replaced.size - len(old)))
    path.write_bytes(_after(bytes(old), new, rng))
    log.unlink()
    return 1


def _replaced(data: bytes) -> Iterator[_Replaced]:
    position = 0
    while position + _HEAD.size <= len(data):
        offset, length, size, _ = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        yield _Replaced(offset, data[position : position + length], size)
        position += length


def _after(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """The content of a file after a power loss.

    Args:
        old: synced.
        new: what the process wrote.
    """
    kind = rng.choice(("keep", "drop", "cut", "zero", "pages"))
    if kind == "keep":
        return new
    if kind == "drop" or len(new) < len(old):
        return old
    if kind == "pages":
        pages = range(0, len(new), _PAGE)
        return b"".join(
            (old if rng.random() < 0.5 else new)[page : page + _PAGE].ljust(
                min(_PAGE, len(new) - page), b"\0"
            )
            for page in pages
        )
    start = rng.randint(len(old), len(new))
    # What was overwritten is old or new.
    head = (rng.choice((old, new))[: len(old)] + new[len(old) :])[:start]
    return head if kind == "cut" else head.ljust(len(new), b"\0")

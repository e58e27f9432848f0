"""The write-ahead log: rows are synced to disk before they are acknowledged.

Each process that writes to a database has its own folder below the database's log folder. It
contains a `lock` file, which the process keeps locked until it ends, and segments: files of
records, of which only the last is written to. If the lock of a folder is free, its process has
ended, and another process replays its rows (`abandoned_logs`).

A record is a marker, the length and the CRC-32 of its payload (little-endian), and the payload:
JSON text in UTF-8, `[table, {column: value}]`. A record that a crash has truncated was never
acknowledged.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

_MARKER: Final = b"\xf5ROW"
"""Its first byte never occurs in UTF-8, so no payload contains the marker."""
_HEADER: Final = struct.Struct("<4sII")
_SUFFIX: Final = ".log"
_LOCK: Final = "lock"
_CHECK: Final = "check"
_CHECK_BYTES: Final = 1 << 14
"""More than the size of most rows."""
_LOW_BYTES: Final = 1 << 20
"""With less free space than this, `check` writes a test file, because space may be reserved."""
_TIMES: Final = ("timestamp", "received")


class Row(NamedTuple):
    """A row: its table, and the values of its columns."""

    table: str
    values: dict[str, Any]


class Segment(NamedTuple):
    """The content of a log file.

    Attributes:
        rows: in the order of writing.
        damaged: the number of bytes before the last intact record that are not a record; 0 unless
            the disk has lost synced data.
        torn: the number of bytes after the last intact record: a write that a crash truncated.
    """

    rows: list[Row]
    damaged: int
    torn: int


def encode(row: Row) -> bytes:
    """The row as a record."""
    values = {
        name: value.isoformat() if isinstance(value, datetime.datetime) else value
        for name, value in row.values.items()
    }
    payload = json.dumps([row.table, values], ensure_ascii=False, separators=(",", ":")).encode()
    return _HEADER.pack(_MARKER, len(payload), zlib.crc32(payload)) + payload


def read_segment(path: Path) -> Segment:
    """The rows of a segment; skips bytes that are not a record."""
    data = path.read_bytes()
    rows: list[Row] = []
    damaged = position = good = 0
    while (found := data.find(_MARKER, position)) >= 0:
        end = _record_end(data, found)
        if end is None:
            position = found + 1
            continue
        damaged += found - good
        rows.append(_decode(data[found + _HEADER.size : end]))
        good = position = end
    return Segment(rows, damaged, len(data) - good)


def _record_end(data: bytes, start: int) -> int | None:
    if len(data) - start < _HEADER.size:
        return None
    _, length, checksum = _HEADER.unpack_from(data, start)
    end = start + _HEADER.size + length
    if end > len(data) or zlib.crc32(data[start + _HEADER.size : end]) != checksum:
        return None
    return int(end)


def _decode(payload: bytes) -> Row:
    table, values = json.loads(payload)
    for name in _TIMES:
        if name in values:
            values[name] = datetime.datetime.fromisoformat(values[name])
    return Row(table, values)


class Log:
    """The log folder of this process. Every method blocks on the disk."""

    def __init__(self, folder: Path) -> None:
        """Creates a new folder in `folder`, the database's log folder, and locks it.

        Raises:
            OSError
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder / uuid.uuid4().hex
        with locked(folder / _LOCK):
            # Holds the outer lock until the new folder is locked, so that the folder never looks
            # abandoned.
            self._folder.mkdir()
            try:
                self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError:
                self._folder.rmdir()
                raise
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._file: int | None = None
        self._path = self._folder
        self._size = 0
        self._number = 0
        self._unsealed: list[Path] = []
        try:
            sync_folder(folder)
        except OSError:
            self.close()
            raise

    def append(self, records: Sequence[bytes]) -> None:
        """Writes records and returns once they would survive a power loss.

        Raises:
            OSError: none of them is stored.
        """
        if self._file is None:
            self._start_segment()
        assert self._file is not None
        data = memoryview(b"".join(records))
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fdatasync(self._file)
        except OSError:
            self._roll_back()
            raise
        self._size += len(data)

    def is_gone(self) -> bool:
        """Whether the folder was removed, so that nothing can be stored in it."""
        return not self._folder.is_dir()

    def check(self, failed: bool) -> None:
        """Checks that a record could be written now.

        It is called every few seconds, so it writes a test file only if the disk may refuse writes.

        Args:
            failed: whether the last record could not be written.

        Raises:
            OSError: a record could not be written.
        """
        disk = os.statvfs(self._folder)
        is_read_only = bool(disk.f_flag & os.ST_RDONLY)
        if failed or is_read_only or disk.f_bavail * disk.f_frsize < _LOW_BYTES:
            self._try_to_write()

    def _try_to_write(self) -> None:
        path = self._folder / _CHECK
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            size = os.write(file, bytes(_CHECK_BYTES))
            os.fdatasync(file)
        finally:
            os.close(file)
            path.unlink()
        if size < _CHECK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _start_segment(self) -> None:
        self._number += 1
        path = self._folder / f"{self._number:08d}{_SUFFIX}"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            sync_folder(self._folder)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        self._file, self._path, self._size = file, path, 0
        self._unsealed.append(path)

    def _roll_back(self) -> None:
        """Truncates the file to its state before a failed write, and ends the segment.

        After a failed sync the state of a file is unknown, and the kernel reports the failure only
        once.
        """
        assert self._file is not None
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)
            os.fdatasync(self._file)
        self._end_segment()
        if not self._size:
            self._unsealed.remove(self._path)
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _end_segment(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def seal(self) -> list[Path]:
        """Ends the segment; the next append starts another.

        Returns:
            The segments written since the last call.
        """
        self._end_segment()
        sealed, self._unsealed = self._unsealed, []
        return sealed

    def close(self) -> None:
        """Ends the segment and releases the lock, so that the folder counts as abandoned."""
        try:
            self.seal()
            if self._folder.is_dir() and not segments(self._folder):
                _remove(self._folder)
        finally:
            os.close(self._lock)


def segments(folder: Path) -> list[Path]:
    """The segments in a process's folder, oldest first."""
    return sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX)


class AbandonedLog:
    """The locked folder of a process that has ended."""

    def __init__(self, folder: Path, lock: int) -> None:
        """Use `abandoned_logs`."""
        self.folder = folder
        self._lock = lock

    def remove(self) -> None:
        """Deletes the folder, once its rows are stored in the tables."""
        for path in segments(self.folder):
            path.unlink()
        _remove(self.folder)

    def release(self) -> None:
        """Releases the lock."""
        os.close(self._lock)


def abandoned_logs(folder: Path) -> list[AbandonedLog] | None:
    """Locks the logs of ended processes in `folder`, the database's log folder; does not wait.

    Returns:
        The logs, which the caller must release; None if another process is locking them.

    Raises:
        OSError
    """
    with locked(folder / _LOCK, wait=False) as mine:
        if not mine:
            return None
        taken = (_take(path) for path in folder.iterdir() if (path / _LOCK).is_file())
        return [log for log in taken if log is not None]


def _take(path: Path) -> AbandonedLog | None:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    if not (path / _LOCK).is_file():
        # Another process has removed it between the opening and the locking.
        os.close(lock)
        return None
    return AbandonedLog(path, lock)


def sweep(folder: Path) -> None:
    """Removes the empty folders of processes that died before they locked them."""
    with locked(folder / _LOCK):
        for path in folder.iterdir():
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Holds an advisory lock (flock) on a file, which is created if it is missing.

    Yields False, without the lock, if another process has it and `wait` is False. The kernel
    releases the lock when the process ends.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        yield False
        return
    try:
        yield True
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Makes the directory entries of a folder survive a power loss."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(folder: Path) -> None:
    """Removes a process's folder, its lock file last."""
    with contextlib.suppress(FileNotFoundError):
        (folder / _CHECK).unlink(missing_ok=True)
        (folder / _LOCK).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise

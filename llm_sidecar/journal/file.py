"""The file of the journal: opening it, and noticing that it was deleted, replaced or damaged."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from llm_sidecar.journal import salvage, schema, wal
from llm_sidecar.journal.clock import Clock
from llm_sidecar.journal.locks import copy_synced, dated, locked, make_folder, sync_folder

log = logging.getLogger(__name__)

NAME: Final = "journal.sqlite3"
_LOCK: Final = "journal.lock"
_TURN: Final = "turn.lock"
SETTLE_SECONDS: Final = 0.5
_PARTS: Final = ("", "-wal", "-shm")
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Identity = tuple[tuple[int, int], ...]


class JournalFile:
    """The open file. Every method blocks on the disk; one thread uses it.

    Attributes:
        folder: the folder of the file.
        id: of the journal in the file; another file has another one.
        ids: of all files that were open at this path.
        clock: of the journal.
        waits: whether the thread waits for the transaction of another process.
    """

    id: str
    clock: Clock

    def __init__(self, folder: Path, set_aside: Path, note: Callable[[str], None]) -> None:
        """Opens nothing yet.

        Args:
            folder: is created if it is missing.
            set_aside: where damaged files go.
            note: called with each repair, in words.
        """
        self.folder = folder
        self.ids: frozenset[str] = frozenset()
        self._aside = set_aside
        self._note = note
        self._db: sqlite3.Connection | None = None
        self._identity: Identity = ()
        self._turn = -1
        self.waits = False

    def opened(self) -> sqlite3.Connection:
        """The connection, which is opened if it is not.

        Raises:
            sqlite3.Error, OSError, DatabaseUnavailable
        """
        if self._db is None:
            make_folder(self.folder)
            with locked(self.folder / _LOCK):
                require_files(self.folder)
                self._keep_damaged_wal()
                is_whole = self._complete()
                db = self._connect()
                if db is None or not is_whole or not _is_sound(db):
                    self._replace_damaged(db)
                else:
                    self._use(db)
        assert self._db is not None
        return self._db

    @contextlib.contextmanager
    def turn(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one transaction.

        SQLite polls for its lock, so a process that commits all the time would starve the others. A
        kernel lock wakes the next one.
        """
        db = self.opened()
        self.waits = True
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX)
        finally:
            self.waits = False
        try:
            yield db
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def is_current(self) -> bool:
        """Whether the files at the path are still the open ones.

        SQLite does not check: it writes to deleted files without an error.
        """
        try:
            return self._identity == self._found()
        except FileNotFoundError:
            return False

    def is_almost_full(self, low: int) -> bool:
        """Whether the disk is read-only, has less than `low` free bytes, or cannot be asked."""
        try:
            disk = os.statvfs(self.folder)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return bool(disk.f_flag & os.ST_RDONLY) or disk.f_bavail * disk.f_frsize < low

    def reopen(self) -> sqlite3.Connection:
        """Opens the journal again after its files were deleted, replaced or damaged.

        Copies what the old connection can still read, because it may be the only copy.
        """
        assert self._db is not None
        log.error("the files of the journal were deleted, replaced or damaged")
        # A process that is deleting the folder fails if new files appear in it.
        time.sleep(SETTLE_SECONDS)
        make_folder(self.folder)
        with locked(self.folder / _LOCK):
            require_files(self.folder)
            self._replace(self._db)
        return self._db

    def close(self) -> None:
        """Closes the file. First copies what is only in a deleted file."""
        db = self._db
        if db is not None and not self.is_current():
            _keep_open(db)
            db = self.reopen() if any(salvage.read(db).values()) else None
        self._db = None
        if db is not None:
            with locked(self.folder / _LOCK):
                db.close()
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1

    def _complete(self) -> bool:
        """Puts an empty page in place of a missing or empty file if its `-wal` is there.

        SQLite would delete that `-wal`, which may have every page.

        Returns:
            Whether nothing was missing. Otherwise the files must be replaced: another process may
            still write to this `-wal`.
        """
        path = self.folder / NAME
        is_whole = _size(path) > 0 or _size(Path(f"{path}-wal")) == 0
        if not is_whole:
            path.write_bytes(bytes(4096))
        return is_whole

    def _keep_damaged_wal(self) -> None:
        """Copies a damaged `-wal`, because SQLite overwrites what it cannot read."""
        path = self.folder / f"{NAME}-wal"
        if wal.damage(path) is None:
            return
        # Without another writer: a transaction that is being written looks like damage.
        with locked(self.folder / _TURN, wait=False) as is_alone:
            if is_alone and (found := wal.damage(path)) is not None:
                kept = dated(self._aside, path.name)
                copy_synced(path, kept)
                self._note(
                    f"the {path.name} of the journal is damaged: {found}; it is kept as "
                    f"{kept.name}, and rows in it may be lost"
                )

    def _connect(self) -> sqlite3.Connection | None:
        """A connection; None if the file is no database."""
        try:
            return schema.connect(self.folder / NAME)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            return None

    def _use(self, db: sqlite3.Connection, content: salvage.Content | None = None) -> None:
        try:
            with _transaction(db):
                self.id = schema.create(db)
                self.ids |= {self.id}
                self.clock = Clock(db)
                if content is not None:
                    salvage.write(db, content, self.clock.now())
            sync_folder(self.folder)
            turn = os.open(self.folder / _TURN, os.O_RDWR | os.O_CREAT, 0o600)
        except BaseException:
            db.close()
            raise
        if self._turn >= 0:
            os.close(self._turn)
        self._turn = turn
        self._identity, self._db = self._found(), db

    def _replace_damaged(self, db: sqlite3.Connection | None) -> None:
        content = {} if db is None else salvage.read(db)
        kept = self._set_aside()
        try:
            self._use(schema.connect(self.folder / NAME), content)
        except BaseException:
            # The damaged file is the only copy, and the disk may be full only for a while.
            self._put_back(kept)
            if db is not None:
                db.close()
            raise
        if db is not None:
            _keep_open(db)
        self._note_damage(kept, content)

    def _replace(self, old: sqlite3.Connection) -> None:
        """Opens a new file, after setting the one at the path aside unless it is new already."""
        if old.in_transaction:
            old.execute("ROLLBACK")
        content = salvage.read(old)
        _keep_open(old)
        with contextlib.suppress(FileNotFoundError):
            if _inode(self.folder / NAME) == self._identity[0]:
                self._note_damage(self._set_aside(), content)
        self._use(schema.connect(self.folder / NAME), content)
        _clear(old)

    def _set_aside(self) -> Path:
        """Moves the files; returns the new path of the first."""
        kept = dated(self._aside, NAME)
        _move(self.folder / NAME, kept)
        sync_folder(self._aside)
        return kept

    def _put_back(self, kept: Path) -> None:
        """Undoes `_set_aside`."""
        for part in _PARTS:
            Path(f"{self.folder / NAME}{part}").unlink(missing_ok=True)
        _move(kept, self.folder / NAME)

    def _note_damage(self, kept: Path, content: salvage.Content) -> None:
        count = len(content.get("rows", ()))
        self._note(
            f"the journal is damaged and kept as {kept.name}; {count} rows of it are readable"
        )

    def _found(self) -> Identity:
        return tuple(_inode(Path(f"{self.folder / NAME}{part}")) for part in _PARTS)


def require_files(folder: Path) -> None:
    """Checks that the journal's files are regular files: opening a pipe would wait for ever.

    Raises:
        OSError: one of them is not a regular file.
    """
    for part in _PARTS:
        path = folder / f"{NAME}{part}"
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, f"{path.name} is not a file: move it away")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error means that the file is damaged."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _is_sound(db: sqlite3.Connection) -> bool:
    try:
        return bool(db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return False


def _move(path: Path, to: Path) -> None:
    """Renames the file of a journal together with its `-wal` and `-shm`."""
    for part in _PARTS:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{part}").rename(f"{to}{part}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _keep_open(db: sqlite3.Connection) -> None:
    """Keeps a connection to replaced files open until the process ends.

    When SQLite closes the last connection, it deletes the `-wal` file by its name. That name now
    belongs to the new journal.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))


def _clear(old: sqlite3.Connection) -> None:
    try:
        with _transaction(old):
            salvage.clear(old)
    except sqlite3.Error as error:
        log.warning("the old journal stays as it is: %s", error)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")

"""A damaged `-wal` file of the journal: no row that SQLite ignores is lost in silence."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llm_sidecar.journal import wal
from llm_sidecar.journal.file import NAME
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.locks import locked
from tests.integration.test_journal import keys, opened, row

WAL = f"{NAME}-wal"
HEADER = 32
FRAME = 24 + 4096
UNREADABLE = "its header cannot be read"


@pytest.fixture
async def killed(tmp_path: Path) -> Path:
    """The folder of a journal whose process was killed after ten commits."""
    async with opened(tmp_path / "log") as journal:
        for number in range(10):
            await journal.commit([row(str(number), b"x" * 5000)])
        return Path(shutil.copytree(tmp_path / "log", tmp_path / "killed"))


@asynccontextmanager
async def noted(folder: Path) -> AsyncIterator[tuple[Journal, list[str]]]:
    """The journal in a folder, and its repairs."""
    notes: list[str] = []
    journal = Journal(folder, folder / "set_aside", notes.append)
    journal.start()
    await journal.opened()
    try:
        yield journal, notes
    finally:
        await journal.close()


def frames(path: Path) -> int:
    return (path.stat().st_size - HEADER) // FRAME


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def note(kept: Path, what: str) -> str:
    return (
        f"the {WAL} of the journal is damaged: {what}; it is kept as {kept.name}, and rows in it "
        "may be lost"
    )


@pytest.mark.parametrize("garbage", [b"garbage", b"\xa5" * 100_000, bytes(50_000)])
async def test_a_file_that_is_not_a_wal_is_kept_and_reported(killed: Path, garbage: bytes) -> None:
    (killed / WAL).write_bytes(garbage)
    async with noted(killed) as (journal, notes):
        await journal.commit([row("after")])
        assert "after" in await keys(journal)
    (kept,) = (killed / "set_aside").iterdir()
    assert kept.read_bytes() == garbage
    assert notes == [note(kept, UNREADABLE)]


async def test_a_damaged_frame_with_commits_behind_it_is_kept_and_reported(killed: Path) -> None:
    path = killed / WAL
    damaged = frames(path) - 5
    flip(path, HEADER + (damaged - 1) * FRAME + 1000)
    content = path.read_bytes()
    async with noted(killed) as (journal, notes):
        found = await keys(journal)
        assert found == [str(number) for number in range(len(found))]
        assert len(found) < 10
        await journal.commit([row("after")])
    (kept,) = (killed / "set_aside").iterdir()
    assert kept.read_bytes() == content
    assert notes == [note(kept, f"a commit follows frame {damaged}, which cannot be read")]


@pytest.mark.parametrize("position", [0, 4, 9, 17, 25])
def test_each_number_in_the_header_is_checked(killed: Path, position: int) -> None:
    flip(killed / WAL, position)
    assert wal.damage(killed / WAL) == UNREADABLE


@pytest.mark.parametrize("position", [0, 5, 9, 17, 24, FRAME - 1])
def test_each_part_of_a_frame_is_checked(killed: Path, position: int) -> None:
    flip(killed / WAL, HEADER + FRAME + position)
    assert wal.damage(killed / WAL) == "a commit follows frame 2, which cannot be read"


@pytest.mark.parametrize("size", [0, 1, HEADER])
def test_a_header_that_was_never_synced_is_no_damage(tmp_path: Path, size: int) -> None:
    (tmp_path / WAL).write_bytes(bytes(size))
    assert wal.damage(tmp_path / WAL) is None


def test_a_missing_wal_is_no_damage(tmp_path: Path) -> None:
    assert wal.damage(tmp_path / WAL) is None


def _cut_off(db: sqlite3.Connection, path: Path) -> None:
    """A transaction that a kill has cut off in the middle of a frame."""
    for _ in range(20):
        db.execute("INSERT INTO numbers VALUES (randomblob(4000))")
    os.truncate(path, path.stat().st_size - 1000)


def _rolled_back(db: sqlite3.Connection, path: Path) -> None:
    """A long transaction that SQLite has written in part, and a commit over its beginning."""
    size = path.stat().st_size
    db.execute("PRAGMA cache_size = 5")
    db.execute("BEGIN")
    db.executemany("INSERT INTO numbers VALUES (randomblob(?))", [[4000]] * 50)
    db.execute("ROLLBACK")
    assert path.stat().st_size > size
    db.execute("INSERT INTO numbers VALUES (1)")


def _started_again(db: sqlite3.Connection, path: Path) -> None:
    """A file that SQLite writes from its beginning again; the old frames are behind the new."""
    db.executemany("INSERT INTO numbers VALUES (randomblob(?))", [[4000]] * 20)
    size = path.stat().st_size
    db.execute("PRAGMA wal_checkpoint(RESTART)")
    db.execute("INSERT INTO numbers VALUES (1)")
    assert path.stat().st_size == size


@pytest.mark.parametrize("happens", [_cut_off, _rolled_back, _started_again])
def test_what_sqlite_ignores_rightly_is_no_damage(
    tmp_path: Path, happens: Callable[[sqlite3.Connection, Path], None]
) -> None:
    db = sqlite3.connect(tmp_path / "db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE numbers (number)")
    happens(db, tmp_path / "db-wal")
    assert wal.damage(tmp_path / "db-wal") is None
    db.close()


async def test_a_wal_that_another_process_is_writing_is_not_judged(killed: Path) -> None:
    flip(killed / WAL, 0)
    with locked(killed / "turn.lock"):
        journal = Journal(killed, killed / "set_aside", lambda _: None)
        journal._writer.file._keep_damaged_wal()
    assert not (killed / "set_aside").exists()


async def test_a_copy_that_does_not_fit_is_removed_and_nothing_is_opened(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    flip(killed / WAL, 0)
    content = (killed / WAL).read_bytes()
    monkeypatch.setattr(shutil, "copyfile", fail)
    journal = Journal(killed, killed / "set_aside", lambda _: None)
    with pytest.raises(OSError, match="No space left on device"):
        journal._writer.file.opened()
    assert list((killed / "set_aside").iterdir()) == []
    assert (killed / WAL).read_bytes() == content

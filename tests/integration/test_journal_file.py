"""The journal's file: deleted, replaced or damaged, on a full disk, while clocks jump."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_sidecar.journal import clock, file, writer
from llm_sidecar.journal.file import NAME
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.locks import locked
from llm_sidecar.journal.requests import Claim, Progress
from llm_sidecar.journal.writer import JournalUnavailable
from tests.integration.test_journal import KEY, event, keys, opened, row, sent, until


@pytest.fixture(autouse=True)
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(file, "SETTLE_SECONDS", 0.0)


async def fill(journal: Journal) -> None:
    """A row, an event, a draft, and a request with progress."""
    await journal.claims.claim(KEY, "f")
    await journal.commit([row("before")], [event("before")], Progress(KEY, state="half"))
    await journal.commit([row("draft")], draft="t")


async def require_filled(journal: Journal, *more: str, again: bool = True) -> None:
    """Asserts that the journal has everything that `fill` added.

    Args:
        again: whether the row may be in its table.
    """
    until = await journal.last_movable()
    assert until is not None
    taken = await journal.take(until, 99)
    assert taken is not None
    entries = taken[1].entries
    assert sorted(entry.key for entry in entries) == sorted(["before", *more])
    assert [entry.again for entry in entries if entry.key == "before"] == [again]
    assert await sent(journal) == ["before", *more]
    await journal.claims.release(KEY)
    assert await journal.claims.claim(KEY, "f") == Claim("half")
    await journal.commit([row("final")], replaces="t")
    assert await journal.find("scores", ["draft"]) is None


def paths(folder: Path) -> list[Path]:
    return [folder / f"{NAME}{part}" for part in ("", "-wal", "-shm")]


# Deleted and replaced files


@pytest.mark.parametrize("gone", ["folder", "files", NAME, f"{NAME}-wal", f"{NAME}-shm"])
async def test_entries_that_are_only_in_deleted_files_are_copied(tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as journal:
        await fill(journal)
        if gone == "folder":
            shutil.rmtree(folder)
        elif gone == "files":
            for path in paths(folder):
                path.unlink()
        else:
            (folder / gone).unlink()
        await journal.commit([row("after")], [event("after")])
        await require_filled(journal, "after")
    async with opened(folder) as journal:
        assert await sent(journal) == ["before", "after"]
        assert await journal.find("scores", ["after"]) == b"{}"


async def test_a_deleted_journal_is_made_again_without_a_commit(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as journal:
        await fill(journal)
        folder.rename(tmp_path / "elsewhere")
        await until((folder / NAME).exists)
        await require_filled(journal)


@pytest.mark.parametrize("instead", ["file", "loop"])
async def test_a_folder_that_is_no_folder_stops_the_journal_only_for_a_while(
    tmp_path: Path, instead: str
) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as journal:
        await journal.commit([row("before")])
        folder.rename(tmp_path / "elsewhere")
        if instead == "file":
            folder.touch()
        else:
            folder.symlink_to(folder)
        await until(lambda: journal.failure is not None)
        with pytest.raises(JournalUnavailable):
            await journal.commit([row("refused")])
        folder.unlink()
        await until(lambda: journal.failure is None)
        await journal.commit([row("after")])
        # A client sends again what was refused, so it must not be stored.
        assert await keys(journal) == ["before", "after"]


async def test_the_deleted_journal_of_several_processes_is_copied_once(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as one, opened(folder) as other:
        await one.commit([row("one")], [event("one")])
        await other.commit([row("other")], [event("other")])
        shutil.rmtree(folder)
        await asyncio.gather(one.commit([row("a")]), other.commit([row("b")]))
        assert sorted(await keys(other)) == ["a", "b", "one", "other"]
        taken = await one.take(await one.last_movable() or 0, 99)
        assert taken is not None
        await one.delete(*taken)
        await one.outbox.sent((await one.outbox.head(99))[-1].number)
        # No process copies the same rows and events from the old files again.
        await other.commit()
        assert await keys(other) == []
        assert await sent(other) == []


async def test_a_journal_that_another_process_made_anew_is_joined(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as one:
        await one.commit([row("one")])
        shutil.rmtree(folder)
        async with opened(folder) as other:
            await other.commit([row("other")])
            await one.commit([row("after")])
            assert sorted(await keys(other)) == ["after", "one", "other"]


async def test_a_batch_of_a_journal_that_was_replaced_deletes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as journal:
        await journal.commit([row("a")], [event("a")])
        taken = await journal.take(await journal.last_movable() or 0, 9)
        (queued,) = await journal.outbox.head(9)
        assert taken is not None
        shutil.rmtree(folder)
        await journal.commit([row("b")], [event("b")])
        await journal.delete(*taken)
        await journal.outbox.sent(queued.number + 1_000_000)
        assert sorted(await keys(journal)) == ["a", "b"]
        assert await sent(journal) == ["a", "b"]


async def test_closing_after_a_deletion_keeps_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    async with opened(folder) as journal:
        await journal.commit([row("a")])
        shutil.rmtree(folder)
    async with opened(folder) as journal:
        assert await keys(journal) == ["a"]


# Damage


def damage(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * length)


async def test_rows_on_intact_pages_of_a_damaged_journal_are_salvaged(tmp_path: Path) -> None:
    aside = tmp_path / "set_aside"
    async with opened(tmp_path) as journal:
        for number in range(300):
            await journal.commit([row(f"{number:03}", b"x" * 500)])
        await journal.commit((), [event("e")])
    path = tmp_path / NAME
    damage(path, path.stat().st_size // 2 // 4096 * 4096, 4096)
    async with opened(tmp_path) as journal:
        found = await keys(journal)
        assert 280 <= len(found) < 300
        assert found == sorted(set(found))
        assert await sent(journal) == ["e"]
        await journal.commit([row("after")])
    (kept,) = aside.glob(f"*-{NAME}")
    assert kept.stat().st_size > 100_000


async def test_a_file_that_is_no_database_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 1000)
    notes: list[str] = []
    journal = Journal(tmp_path, tmp_path / "set_aside", notes.append)
    journal.start()
    await journal.commit([row("a")])
    assert await keys(journal) == ["a"]
    await journal.close()
    (kept,) = (tmp_path / "set_aside").iterdir()
    assert kept.read_bytes() == b"no database" * 1000
    assert notes == [f"the journal is damaged and kept as {kept.name}; 0 rows of it are readable"]


@pytest.mark.parametrize("part", ["", "-wal"])
async def test_a_pipe_in_place_of_a_file_is_refused_until_it_is_moved(
    tmp_path: Path, part: str
) -> None:
    pipe = tmp_path / f"{NAME}{part}"
    os.mkfifo(pipe)
    async with opened(tmp_path) as journal:
        with pytest.raises(JournalUnavailable, match=f"{pipe.name} is not a file: move it away"):
            await journal.commit([row("refused")])
        assert f"{pipe.name} is not a file" in (journal.refusal() or "")
        pipe.unlink()
        await until(lambda: journal.refusal() is None)
        await journal.commit([row("after")])
        assert await keys(journal) == ["after"]


async def test_a_pipe_that_replaces_the_open_file_is_refused_until_it_is_moved(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        await journal.commit([row("before")])
        (tmp_path / NAME).unlink()
        os.mkfifo(tmp_path / NAME)
        await until(lambda: f"{NAME} is not a file" in (journal.refusal() or ""))
        (tmp_path / NAME).unlink()
        await until(lambda: journal.refusal() is None)
        assert await keys(journal) == ["before"]


@pytest.mark.parametrize("is_missing", [True, False])
async def test_the_log_of_a_file_that_is_missing_or_empty_is_read(
    tmp_path: Path, is_missing: bool
) -> None:
    kept = tmp_path / "kept"
    async with opened(tmp_path / "log") as journal:
        await fill(journal)
        # As a killed process leaves it.
        shutil.copytree(tmp_path / "log", kept)
    (kept / NAME).unlink()
    if not is_missing:
        (kept / NAME).touch()
    async with opened(kept) as journal:
        await require_filled(journal)


async def test_damage_that_shows_later_is_repaired_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise the journal may have read the page just before it is damaged.
    monkeypatch.setattr(writer, "TICK_SECONDS", 1000.0)
    async with opened(tmp_path) as journal:
        await fill(journal)

        await journal.commit([row("more", b"x" * 100_000)])
        checkpoint = sqlite3.connect(tmp_path / NAME)
        checkpoint.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = checkpoint.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'events'"
        ).fetchone()
        checkpoint.close()
        damage(tmp_path / NAME, (page - 1) * 4096, 4096)
        await journal.commit([row("after")], [event("after")])
        assert sorted(await keys(journal)) == ["after", "before", "more"]
        assert await sent(journal) == ["after"]
    assert len(list((tmp_path / "set_aside").glob(f"*-{NAME}"))) == 1


# Disks


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_nothing_of_a_write_that_fails_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await fill(journal)
        wal = (tmp_path / f"{NAME}-wal").stat().st_size
        with small_files(wal + 5000):
            with pytest.raises(JournalUnavailable, match="The journal cannot be written") as caught:
                await journal.commit([row("big", b"x" * 100_000)], [event("big")])
            assert caught.value.retry_after == 5
            refusal = journal.refusal() or ""
            assert refusal.startswith("The database accepts no rows: ")
            assert refusal.endswith(f"; free space at {tmp_path} or check LANCEDB_URI.")
        await until(lambda: journal.refusal() is None)
        await journal.commit([row("after")], [event("after")])
        assert sorted(await keys(journal)) == ["after", "before"]
        assert await sent(journal) == ["before", "after"]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


async def test_a_journal_on_a_read_only_disk_opens_once_it_can_be_written(mounted: Path) -> None:
    remount(mounted, "ro")
    async with opened(mounted / "log") as journal:
        with pytest.raises(JournalUnavailable, match="Read-only file system"):
            await journal.commit([row("refused")])
        assert "Read-only file system" in (journal.refusal() or "")
        remount(mounted, "rw")
        await until(lambda: journal.refusal() is None)
        await journal.commit([row("after")])
        assert await keys(journal) == ["after"]


async def test_a_disk_that_cannot_be_asked_for_its_space_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(path: object) -> None:
        asked.append(path)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    async with opened(tmp_path) as journal:
        await journal.commit([row("a")])
        monkeypatch.setattr(os, "statvfs", refuse)
        async with asyncio.timeout(10):
            while len(asked) < 2:
                await asyncio.sleep(0.01)
            await journal.commit([row("b")])
        assert journal.refusal() is None


async def test_a_full_disk_refuses_rows_and_loses_none(mounted: Path) -> None:
    async with opened(mounted / "log") as journal:
        await fill(journal)
        ballast = mounted / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        await until(journal.refusal)
        assert "No space left on device" in (journal.refusal() or "")
        with pytest.raises(JournalUnavailable, match="No space left on device"):
            await journal.commit([row("refused", b"x" * 100_000)])
        assert await journal.find("scores", ["before"]) == b"{}"
        ballast.unlink()
        await until(lambda: journal.refusal() is None)
        await journal.commit([row("after")], [event("after")])
        await require_filled(journal, "after", again=False)


async def test_a_damaged_journal_on_a_full_disk_is_salvaged_once_there_is_space(
    mounted: Path,
) -> None:
    folder, ballast = mounted / "log", mounted / "ballast"
    async with opened(folder) as journal:
        for number in range(100):
            await journal.commit([row(f"{number:03}", b"x" * 9000)], [event(f"{number:03}")])
    damage(folder / NAME, 40 * 4096, 4096)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    # Enough to open a journal, and too little for what is in this one.
    os.truncate(ballast, ballast.stat().st_size - (300 << 10))
    async with opened(folder) as journal:
        with pytest.raises(JournalUnavailable, match="No space left on device"):
            await journal.opened()
        before = open_files()
        for _ in range(20):
            with pytest.raises(JournalUnavailable, match="No space left on device"):
                await journal.commit([row("refused")])
        assert open_files() <= before
        assert list((folder / "set_aside").iterdir()) == []
        ballast.unlink()
        await until(lambda: journal.refusal() is None)
        assert len(await keys(journal)) == 99
        assert len(await sent(journal)) == 100


async def test_a_transaction_of_another_process_that_takes_long_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as journal:
        await journal.commit([row("a")])
        other = sqlite3.connect(tmp_path / NAME, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        committing = asyncio.create_task(journal.commit([row("b")]))
        await asyncio.sleep(0)
        monkeypatch.setattr(writer, "_COMMIT_SECONDS", 0.05)
        # A disk that hangs looks the same.
        await until(journal.refusal)
        assert "the disk takes longer than 5 s" in (journal.refusal() or "")
        other.execute("COMMIT")
        other.close()
        await committing
        # Closing has the same deadline.
        monkeypatch.undo()
        assert journal.refusal() is None
        assert await keys(journal) == ["a", "b"]


async def test_a_process_that_keeps_the_journal_is_not_taken_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", 0.05)
    async with opened(tmp_path) as journal:
        await until(lambda: journal.refusal() is None)
        with locked(tmp_path / "turn.lock"):
            await until(journal.refusal)
            with pytest.raises(
                JournalUnavailable,
                match="stored: another process has kept the journal for longer than 5 s",
            ):
                await journal.commit([row("a")])
        monkeypatch.undo()
        await until(lambda: journal.refusal() is None)


# Clocks


async def test_setting_the_clock_expires_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MAINTAIN_TICKS", 1)
    now = time.time
    async with opened(tmp_path) as journal:
        await fill(journal)
        for jump in (30 * 86400, -30 * 86400):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            await journal.commit()
            assert await keys(journal) == ["before"]
            assert await sent(journal) == ["before"]
            assert journal.status()["oldest_seconds"] < 60


async def test_ages_go_on_after_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {"seconds": 1000.0}
    monkeypatch.setattr(time, "clock_gettime", lambda _: passed["seconds"])
    async with opened(tmp_path) as journal:
        await journal.commit([row("a")])
        passed["seconds"] = 1100.0
        await journal._writer.run(lambda db: journal._writer.file.clock.save(db))
    boot = tmp_path / "boot_id"
    boot.write_text("another boot\n")
    monkeypatch.setattr(clock, "_BOOT_ID", boot)
    passed["seconds"] = 5.0
    async with opened(tmp_path) as journal:
        await journal.commit()
        assert journal.status()["oldest_seconds"] == 100.0
        passed["seconds"] = 12.0
        assert journal.status()["oldest_seconds"] == 107.0


# Versions


async def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.commit([row("a")])
    with contextlib.closing(sqlite3.connect(tmp_path / NAME, isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = 9 WHERE name = 'version'")
    async with opened(tmp_path) as journal:
        with pytest.raises(JournalUnavailable, match="The journal is of version 9"):
            await journal.commit([row("b")])
    with contextlib.closing(sqlite3.connect(tmp_path / NAME)) as db:
        assert db.execute("SELECT key FROM rows").fetchall() == [("a",)]
    assert not (tmp_path / "set_aside").exists()


async def test_a_folder_can_be_deleted_while_the_journal_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file, "SETTLE_SECONDS", 0.3)
    async with opened(tmp_path / "log") as journal:
        await journal.commit([row("a")])
        (tmp_path / "log" / NAME).unlink()
        committing = asyncio.create_task(journal.commit([row("b")]))
        await until(lambda: any("were deleted" in message for message in caplog.messages))
        # As a slow deletion does.
        await asyncio.to_thread(shutil.rmtree, tmp_path / "log")
        await committing
        assert sorted(await keys(journal)) == ["a", "b"]

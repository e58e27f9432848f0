"""The database while the disk is full, LanceDB is unavailable, or a table is damaged."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lancedb
import pytest

from llm_sidecar.db import (
    HermesScoreSchema,
    Phi3FeedbackSchema,
    PublishedFeedback,
    Store,
    compaction,
    lance,
    mover,
    repair,
    tables,
)
from llm_sidecar.db import store as store_module
from llm_sidecar.db.location import location_of
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal import rows, writer
from llm_sidecar.journal.locks import locked
from llm_sidecar.journal.rows import Entry

SCORES = "hermes_scores"


def score(name: str = "r", **values: Any) -> HermesScoreSchema:
    return HermesScoreSchema(run_id=name, score=0.5, **values)


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def names(folder: Path) -> list[str]:
    store = await Store.open(folder)
    try:
        return sorted(row["run_id"] for row in await store.last(SCORES, 0))
    finally:
        await store.close()


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A database after a crash in which the newest rows are in LanceDB but not synced, and the keys
    of its rows, which are scores. Tests copy it."""
    folder = tmp_path_factory.mktemp("dead")
    return folder / "copy", asyncio.run(_die(folder))


async def _die(folder: Path) -> list[str]:
    async def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    keys = [str(number) for number in range(10)]
    store = await Store.open(folder / "db")
    for key in keys[:5]:
        await store.append(score(key))
        await store.last(SCORES, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.Tables, "sync", fail)
        for key in keys[5:]:
            await store.append(score(key))
        await until(lambda: store.status()["state"] == "away")
        shutil.copytree(folder / "db", folder / "copy")
    await store.close()
    return keys


def manifests(folder: Path) -> list[Path]:
    return sorted((folder / f"{SCORES}.lance" / "_versions").glob("*.manifest"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_rows_are_refused_while_the_disk_is_full_and_accepted_after(small_disk: Path) -> None:
    store = await Store.open(small_disk / "db")
    await store.append(score("before"))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    accepted, refused = ["before"], 0
    for number in range(200):
        try:
            await store.append(score(f"full-{number}", rationale="x" * 2000))
        except DatabaseUnavailable as error:
            refused += 1
            assert "No space left on device" in error.detail
            assert error.retry_after
            assert store.status()["reason"]
            assert not store.is_open()
        else:
            accepted.append(f"full-{number}")
    assert refused
    ballast.unlink()
    await store.append(score("after"))
    accepted.append("after")
    await until(lambda: store.status()["state"] == "open" and not store.status()["rows_waiting"])
    assert store.is_open()
    await store.close()
    assert await names(small_disk / "db") == sorted(accepted)


async def test_a_full_disk_is_detected_without_a_row(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TICK_SECONDS", 0.02)
    store = await Store.open(small_disk / "db")
    assert store.refusal() is None
    assert store.status()["journal"]["accepts_rows"] is True
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    await until(store.refusal)
    assert store.refusal() == (
        "The database accepts no rows: No space left on device; free space at "
        f"{small_disk / 'db' / '_log'} or check LANCEDB_URI."
    )
    assert store.status()["journal"]["accepts_rows"] is False
    ballast.unlink()
    await until(lambda: store.refusal() is None)
    await store.append(score("after"))
    await store.close()
    assert await names(small_disk / "db") == ["after"]


async def test_a_removed_database_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TICK_SECONDS", 0.02)
    folder = tmp_path / "db"
    store = await Store.open(folder)
    folder.rename(tmp_path / "removed")
    # A server that is not ready receives no rows, so this must work without one.
    await until((folder / "_log").is_dir)
    await until(lambda: store.refusal() is None)
    await store.append(score("after"))
    await store.close()
    assert await names(folder) == ["after"]


async def test_the_journal_accepts_rows_while_a_table_is_missing(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    table, hidden = tmp_path / f"{SCORES}.lance", tmp_path / "hidden"
    table.rename(hidden)
    table.write_text("in the way")
    await store.append(score("meanwhile"))
    await until(lambda: store.status()["state"] == "away")
    await store.append(score("later"))
    assert store.refusal() is None
    assert store.status()["rows_waiting"] == 2
    with pytest.raises(DatabaseUnavailable) as caught:
        await store.last(SCORES, 1)
    assert caught.value.retry_after
    table.unlink()
    hidden.rename(table)
    await until(lambda: store.status()["state"] == "open" and not store.status()["rows_waiting"])
    assert len(await store.last(SCORES, 0)) == 2
    await store.close()


async def test_an_unavailable_database_accepts_rows_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 2000)
    store = await Store.open(tmp_path)
    table = tmp_path / f"{SCORES}.lance"
    table.rename(tmp_path / "hidden")
    table.write_text("in the way")
    accepted = []
    with pytest.raises(DatabaseUnavailable, match="journal is full") as caught:
        for number in range(100):
            await store.append(score(f"{number:03}"))
            accepted.append(f"{number:03}")
    assert caught.value.retry_after
    monkeypatch.setattr(rows, "MOST_BYTES", store.status()["journal"]["bytes"])
    assert store.refusal() == "The journal is full until LanceDB takes its rows; check LANCEDB_URI."
    assert 5 < len(accepted) < 50
    table.unlink()
    (tmp_path / "hidden").rename(table)
    await until(lambda: store.refusal() is None)
    await store.append(score("after"))
    await store.close()
    assert await names(tmp_path) == [*accepted, "after"]


async def test_rows_left_in_the_journal_are_moved_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_BACKOFF_FIRST", 0.05)
    store = await Store.open(tmp_path)
    table = tmp_path / f"{SCORES}.lance"
    table.rename(tmp_path / "hidden")
    table.write_text("in the way")
    await store.append(score("left"))
    await store.close()
    table.unlink()
    (tmp_path / "hidden").rename(table)
    assert await names(tmp_path) == ["left"]


async def test_rows_are_accepted_before_the_database_is_open(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.start()
    await store.append(score("early"))
    assert store.status()["state"] == "opening"
    assert [row["run_id"] for row in await store.last(SCORES, 1)] == ["early"]
    await store.close()


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros"])
async def test_an_unreadable_newest_version_is_set_aside_and_its_rows_moved_again(
    dead: tuple[Path, list[str]], tmp_path: Path, damage: str
) -> None:
    folder, keys = shutil.copytree(dead[0], tmp_path / "db"), dead[1]
    newest = manifests(folder)[0]
    content = newest.read_bytes()
    damaged = {"empty": b"", "cut": content[:-10], "zeros": b"\0" * len(content)}[damage]
    newest.write_bytes(damaged)
    store = await Store.open(folder)
    assert sorted(row["run_id"] for row in await store.last(SCORES, 0)) == keys
    (repair,) = [text for text in store.status()["repairs"] if "set aside" in text]
    await store.close()
    assert SCORES in repair
    (aside,) = (folder / "_log" / "set_aside").iterdir()
    assert aside.read_bytes() == damaged


async def test_a_table_without_a_readable_version_is_set_aside(tmp_path: Path) -> None:
    await (await Store.open(tmp_path)).close()
    for manifest in manifests(tmp_path):
        manifest.write_bytes(b"")
    store = await Store.open(tmp_path)
    await store.append(score("new"))
    assert len(store.status()["repairs"]) == 2
    await store.close()
    assert await names(tmp_path) == ["new"]


async def test_a_table_without_read_permission_is_not_set_aside(tmp_path: Path) -> None:
    await (await Store.open(tmp_path)).close()
    for manifest in manifests(tmp_path):
        manifest.unlink()
        manifest.mkdir()
    with pytest.raises(DatabaseUnavailable):
        await Store.open(tmp_path)
    assert all(manifest.is_dir() for manifest in manifests(tmp_path))


async def test_fragments_and_files_stay_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "FRAGMENTS", 8)
    monkeypatch.setattr(compaction, "_PAUSE", 0.0)
    monkeypatch.setattr(compaction, "_SHARE", 0.0)
    store = await Store.open(tmp_path)
    for number in range(30):
        await store.append(score(str(number)))
        # Each query first moves the row to its table, so each row is a commit.
        await store.last(SCORES, 1)
    await until(lambda: store.status()["fragments"][SCORES] < 10)
    assert store.status()["last_compaction"]
    assert len(await store.last(SCORES, 0)) == 30
    await store.close()


async def test_a_compaction_gives_back_the_memory_that_it_has_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(compaction, "trim_heap", lambda: trimmed.append(True))
    store = await Store.open(tmp_path)
    await store.append(score())
    await store.compact()
    assert trimmed == [True]
    await store.close()


async def test_freed_memory_is_given_back_while_rows_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(compaction, "trim_heap", lambda: trimmed.append(True))
    monkeypatch.setattr(compaction, "_TRIM_SECONDS", 0.0)
    monkeypatch.setattr(compaction, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(mover, "_MOVE_EVERY", 0.01)
    store = await Store.open(tmp_path)
    await store.append(score())
    await until(lambda: trimmed)
    # Once, because no rows come any more; the compaction that is then due does it again.
    await until(lambda: store.status()["last_compaction"])
    assert len(trimmed) == 2
    await store.close()


@pytest.mark.parametrize(("uri", "size"), [(None, 4 << 20), ("s3://bucket/db", 16 << 20)])
async def test_the_caches_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None, size: int
) -> None:
    async def connect(*_: object, session: dict[str, int], **__: object) -> dict[str, int]:
        return session

    monkeypatch.setattr(lancedb, "Session", dict)
    monkeypatch.setattr(lancedb, "connect_async", connect)
    location = location_of(uri or tmp_path, tmp_path / "logs")
    assert await lance.connect(location, create=True) == {
        "index_cache_size_bytes": size,
        "metadata_cache_size_bytes": size,
    }


async def test_processes_that_write_one_row_each_compact_when_they_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "FRAGMENTS", 4)
    fragments = []
    for number in range(6):
        store = Store(tmp_path)
        store.start()
        await store.append(score(str(number)))
        await store.close()
        fragments.append(store.status()["fragments"][SCORES])
    assert fragments == [1, 2, 3, 1, 2, 3]
    store = await Store.open(tmp_path)
    assert len(await store.last(SCORES, 0)) == 6
    await store.close()


async def test_a_power_loss_during_compaction_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose_power(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    # Makes the compaction delete every version that it may delete.
    monkeypatch.setattr(lance, "_KEEP_VERSIONS", datetime.timedelta(milliseconds=1))
    store = await Store.open(tmp_path / "db")
    for number in range(5):
        await store.append(score(str(number)))
        await store.last(SCORES, 1)
    monkeypatch.setattr(tables.Tables, "sync", lose_power)
    with pytest.raises(DatabaseUnavailable, match="Input/output error"):
        await store.compact()
    lost = shutil.copytree(tmp_path / "db", tmp_path / "lost")
    await store.close()
    synced = json.loads((lost / "_log" / "synced.json").read_bytes())[SCORES]
    newer = [path for path in manifests(lost) if 2**64 - 1 - int(path.stem) > synced]
    assert newer
    for manifest in newer:
        manifest.unlink()
    assert await names(lost) == [str(number) for number in range(5)]


async def test_only_one_process_compacts_at_a_time(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    await store.append(score())
    with locked(tmp_path / "_log" / "compact.lock"):
        assert not await store.compact()
        assert store.status()["last_compaction"] is None
    assert await store.compact()
    assert store.status()["last_compaction"]
    await store.close()


async def test_a_cancelled_caller_loses_no_other_row(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    appending = [asyncio.create_task(store.append(score(str(n)))) for n in range(20)]
    await asyncio.sleep(0)
    appending[3].cancel()
    await asyncio.gather(*appending, return_exceptions=True)
    found = [row["run_id"] for row in await store.last(SCORES, 0)]
    await store.close()
    # The row of the cancelled caller may be stored or not.
    others = [name for name in found if name != "3"]
    assert sorted(others, key=int) == [str(n) for n in range(20) if n != 3]


async def test_a_machine_error_sets_no_version_aside(
    dead: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, keys = shutil.copytree(dead[0], tmp_path / "db"), dead[1]
    (folder / "_log" / "synced.json").write_text("damaged")

    async def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(repair, "_read_whole", fail)
        with pytest.raises(DatabaseUnavailable, match="No space left"):
            await Store.open(folder)
    store = await Store.open(folder)
    found = sorted(row["run_id"] for row in await store.last(SCORES, 0))
    assert not any("set aside" in repair for repair in store.status()["repairs"])
    await store.close()
    assert found == keys


async def test_a_hanging_disk_refuses_rows_within_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", 0.3)
    store = await Store.open(tmp_path)
    await store.append(score("before"))
    release, hanging = threading.Event(), threading.Event()

    def hang(_: object) -> None:
        hanging.set()
        release.wait()

    blocking = asyncio.create_task(store._journal._writer.run(hang))
    await until(hanging.is_set)
    with pytest.raises(DatabaseUnavailable, match="is not stored"):
        await store.append(score("not begun"))
    with pytest.raises(DatabaseUnavailable, match="is not known to be stored"):
        await blocking
    release.set()
    await store.append(score("after"))
    rows = await store.last(SCORES, 0)
    await store.close()
    assert sorted(row["run_id"] for row in rows) == ["after", "before"]


async def test_a_process_that_moves_for_long_blocks_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_QUERY_SECONDS", 0.2)
    store = await Store.open(tmp_path)
    with locked(tmp_path / "_log" / "mover.lock"):
        for number in range(5):
            await store.append(score(str(number)))
        with pytest.raises(DatabaseUnavailable, match=r"longer than 0\.2 s"):
            await store.last(SCORES, 0)
    monkeypatch.undo()
    assert len(await store.last(SCORES, 0)) == 5
    await store.close()


async def test_the_database_stays_locked_while_an_abandoned_write_runs(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    opened = await store.opened()
    end = asyncio.Event()
    writing = asyncio.create_task(opened._complete(end.wait()))
    await asyncio.sleep(0)
    writing.cancel()
    await store.close()
    with locked(tmp_path / "_log" / "alive.lock", wait=False) as alone:
        assert not alone
    end.set()
    await until(lambda: is_free(tmp_path / "_log" / "alive.lock"))


def is_free(path: Path) -> bool:
    with locked(path, wait=False) as mine:
        return mine


async def test_rows_that_cannot_be_read_are_set_aside_and_block_no_others(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    await store._journal.commit([Entry(SCORES, "bad", b'{"run_id":"bad"}')])
    await store.append(score("good"))
    assert [row["run_id"] for row in await store.last(SCORES, 0)] == ["good"]
    (repair,) = store.status()["repairs"]
    assert store.status()["rows_waiting"] == 0
    await store.close()
    (kept,) = (tmp_path / "_log" / "set_aside").iterdir()
    assert kept.read_bytes() == b'hermes_scores\t{"run_id":"bad"}\n'
    assert repair == (
        "1 rows are damaged or of another version of the sidecar; they are kept as " + kept.name
    )


async def test_until_the_database_is_open_its_journal_identifies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(mover, "open_tables", fail)
        store = Store(tmp_path)
        store.start()
        name = await store.id()
        assert store.has_id(name)
        await store.close()
    again = await Store.open(tmp_path)
    own = await again.id()
    assert own != name
    assert [again.has_id(each) for each in (name, own, "another")] == [True, True, False]
    await again.close()


async def test_feedback_that_the_database_has_stored_is_not_stored_again_before_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    values = {
        "feedback_id": "f-1",
        "transaction_id": "t",
        "feedback_type": "rating",
        "feedback_content": "5",
    }
    store = await Store.open(tmp_path)
    name = await store.id()
    await store.append(Phi3FeedbackSchema(**values))
    await store.close()

    with monkeypatch.context() as patch:
        patch.setattr(mover, "open_tables", fail)
        store = Store(tmp_path)
        store.start()
        # A relay sends the event of a process that was killed, and this process receives it.
        for other in (name, "another database"):
            own = PublishedFeedback(**values, stored_in=other).from_entry(other)
            await store.commit(Transaction([own]))
        await store.close()

    again = await Store.open(tmp_path)
    found = [(row["feedback_id"], row["source"]) for row in await again.last("phi3_feedback", 0)]
    await again.close()
    assert found == [("f-1", "bus"), ("f-1", "direct")]
    assert not (tmp_path / "_log" / "set_aside").exists()


async def test_feedback_in_the_journal_is_found_while_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def feedback(name: str) -> PublishedFeedback:
        return PublishedFeedback(
            feedback_id=f'f-"ü\n-{name}',
            transaction_id=f"t-{name}",
            feedback_type="rating",
            feedback_content=json.dumps({"feedback_id": "other"}),
        )

    monkeypatch.setattr(mover, "open_tables", fail)
    store = Store(tmp_path)
    store.start()
    await store.commit(Transaction([feedback("channel"), feedback("inbox").from_entry("e-1")]))
    await store._journal.commit([Entry("phi3_feedback", "inbox:damaged", b'{"other"')])
    found = [await store.feedback_transaction(f'f-"ü\n-{name}') for name in ("channel", "inbox")]
    assert found == ["t-channel", "t-inbox"]
    with pytest.raises(DatabaseUnavailable, match="Input/output error"):
        await store.feedback_transaction("other")
    await store.close()


async def test_the_status_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await Store.open(tmp_path)
    await store.append(score())
    await store.compact()
    await store.close()
    compacted = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    os.utime(tmp_path / "_log" / "compacted", 2 * (compacted.timestamp(),))
    store = await Store.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda *_: pytest.fail("the event loop must not wait"))
        status = store.status()
    assert status["last_compaction"] == compacted.isoformat()
    await store.close()

"""Write-ahead logs of versions before the journal: none of their rows is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.db import FEEDBACK, RUNS, SCORES, HermesScoreSchema, Store, cli_main, old_log
from llm_sidecar.db.old_log import read_segment
from llm_sidecar.journal.locks import locked
from tests.integration.test_db_mover import until
from tests.old_log import record, write_old_log

DATABASE = Path(__file__).parent / "database_with_log.tar.gz"
"""A database of a killed process of the version before the journal. It acknowledged 60 rows of
three tables; the last ten are only in the log."""


def score(name: str, **changes: Any) -> bytes:
    values = HermesScoreSchema(run_id=name, score=0.5).as_row() | {"row_id": name}
    return record(SCORES, values | changes)


def read(path: Path, data: bytes) -> tuple[list[str], int, int]:
    """The keys, the number of unknown rows and of damaged bytes of a segment."""
    path.write_bytes(data)
    found = read_segment(path)
    return [entry.key for entry in found.entries], found.unknown, found.damaged


def test_a_truncated_record_is_neither_a_row_nor_damage(tmp_path: Path) -> None:
    cut = score("cut")
    for length in range(len(cut)):
        assert read(tmp_path / "1", score("whole") + cut[:length]) == (["whole"], 0, 0)
    assert read(tmp_path / "1", score("whole") + b"\0" * 5000) == (["whole"], 0, 0)


def test_rows_after_a_damaged_one_are_read(tmp_path: Path) -> None:
    damaged = bytearray(score("damaged"))
    damaged[20] ^= 1
    data = score("first") + damaged + score("third")
    assert read(tmp_path / "1", data) == (["first", "third"], 0, len(damaged))


def test_a_marker_in_a_text_begins_no_record(tmp_path: Path) -> None:
    assert read(tmp_path / "1", score("a", rationale="õROW") * 2) == (["a", "a"], 0, 0)


async def test_the_rows_of_an_old_log_are_moved_once(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    # The old version kept its log for some minutes after it had moved the rows.
    (stored,) = [HermesScoreSchema(run_id="stored", score=0.5)]
    await store.append(stored)
    await store.close()
    folder = write_old_log(
        tmp_path / "_log",
        record(SCORES, stored.as_row()) + score("a"),
        score("b") + score("b")[:-3],
    )
    store = await Store.open(tmp_path)
    found = sorted(row["run_id"] for row in await store.last(SCORES, 0))
    repairs = store.status()["repairs"]
    await store.close()
    assert found == ["a", "b", "stored"]
    assert repairs == ["3 rows of an old log were read into the journal"]
    assert not folder.exists()


async def test_a_damaged_segment_and_rows_of_another_version_are_kept(tmp_path: Path) -> None:
    damaged = score("a")[:-1] + b"x" + score("b")
    unknown = score("c", mood="good") + record("moods", {"mood": "good"}) + score("d")
    write_old_log(tmp_path / "_log", damaged, unknown)
    store = await Store.open(tmp_path)
    found = sorted(row["run_id"] for row in await store.last(SCORES, 0))
    repairs = store.status()["repairs"]
    await store.close()
    assert found == ["b", "d"]
    kept = sorted((tmp_path / "_log" / "set_aside").iterdir())
    assert [path.read_bytes() for path in kept] == [damaged, unknown]
    assert repairs == [
        f"a log has {len(score('a'))} damaged bytes; it is kept as {kept[0].name}",
        f"a log has 2 rows of another version of the sidecar; it is kept as {kept[1].name}",
        "2 rows of an old log were read into the journal",
    ]


async def test_a_folder_with_the_name_of_a_segment_is_kept(tmp_path: Path) -> None:
    folder = write_old_log(tmp_path / "_log", score("a"))
    (folder / "x.log").mkdir()
    (folder / "x.log" / "file").write_text("content")
    os.mkfifo(folder / "y.log")
    store = await Store.open(tmp_path)
    assert [row["run_id"] for row in await store.last(SCORES, 0)] == ["a"]
    repairs = store.status()["repairs"]
    await store.close()
    kept = sorted((tmp_path / "_log" / "set_aside").iterdir())
    assert (kept[0] / "file").read_text() == "content"
    assert repairs == [
        *(
            f"{path.name[-5:]} in an old log is not a file; it is kept as {path.name}"
            for path in kept
        ),
        "1 rows of an old log were read into the journal",
    ]


async def test_the_log_of_a_living_process_is_read_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old_log, "_AGAIN_SECONDS", 0.0)
    folder = write_old_log(tmp_path / "_log", score("a"))
    with locked(folder / "lock"):
        store = await Store.open(tmp_path)
        assert await store.last(SCORES, 0) == []
        assert folder.is_dir()
    await until(lambda: not folder.exists())
    assert [row["run_id"] for row in await store.last(SCORES, 0)] == ["a"]
    await store.close()


def test_a_database_with_a_log_opens_with_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.unpack_archive(DATABASE, tmp_path)
    folder = tmp_path / "lancedb"
    (log,) = folder.glob("_log/*/*.log")
    assert len(read_segment(log).entries) == 10
    monkeypatch.setenv("LANCEDB_URI", str(folder))
    assert cli_main(["migrate"]) == 0

    async def rows() -> dict[str, list[dict[str, Any]]]:
        store = await Store.open(folder)
        try:
            return {table: await store.last(table, 0) for table in (FEEDBACK, RUNS, SCORES)}
        finally:
            await store.close()

    found = asyncio.run(rows())
    names = {FEEDBACK: "transaction_id", RUNS: "run_id", SCORES: "run_id"}
    keys = [row[names[table]] for table, some in found.items() for row in some]
    assert sorted(keys, key=int) == [str(number) for number in range(60)]
    assert cli_main(["verify"]) == 0
    assert not log.parent.exists()

"""The write-ahead log: its records, damage, and abandoned logs."""

from __future__ import annotations

import datetime
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llm_sidecar.db.log import (
    Log,
    Row,
    abandoned_logs,
    encode,
    locked,
    read_segment,
    segments,
)

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)


def row(text: str = "text", **values: Any) -> Row:
    return Row("hermes_scores", {"run_id": text, "timestamp": NOW, "score": 0.1, **values})


def segment_of(folder: Path) -> Path:
    (path,) = folder.glob("*/*.log")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("text", ["", "\x00\x1b\"'\\\n", "🚀\u202e", "\xf5ROW", "x" * 1_000_000])
def test_a_row_is_read_as_it_was_written(log: Log, tmp_path: Path, text: str) -> None:
    log.append([encode(row(text, latencies={"score": None}))])
    assert read_segment(segment_of(tmp_path)).rows == [row(text, latencies={"score": None})]


def test_a_truncated_record_is_neither_a_row_nor_damage(log: Log, tmp_path: Path) -> None:
    log.append([encode(row("whole"))])
    path, cut = segment_of(tmp_path), encode(row("cut"))
    whole = path.read_bytes()
    for length in range(len(cut)):
        path.write_bytes(whole + cut[:length])
        found = read_segment(path)
        assert (found.rows, found.damaged, found.torn) == ([row("whole")], 0, length)


def test_zeros_after_the_last_row_are_not_damage(log: Log, tmp_path: Path) -> None:
    log.append([encode(row())])
    with segment_of(tmp_path).open("ab") as file:
        file.write(b"\0" * 5000)
    found = read_segment(segment_of(tmp_path))
    assert (found.rows, found.damaged, found.torn) == ([row()], 0, 5000)


def test_rows_after_a_damaged_one_are_read(log: Log, tmp_path: Path) -> None:
    records = [encode(row(name)) for name in ("first", "second", "third")]
    log.append(records)
    data = bytearray(segment_of(tmp_path).read_bytes())
    data[len(records[0]) + 20] ^= 1
    segment_of(tmp_path).write_bytes(data)
    found = read_segment(segment_of(tmp_path))
    assert found.rows == [row("first"), row("third")]
    assert found.damaged == len(records[1])


def test_a_failed_write_leaves_no_bytes_and_the_next_one_succeeds(log: Log, tmp_path: Path) -> None:
    log.append([encode(row("before"))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (segment_of(tmp_path).stat().st_size + 30, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.append([encode(row("too much"))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append([encode(row("after"))])
    found = [read_segment(path) for path in log.seal()]
    assert [segment.rows for segment in found] == [[row("before")], [row("after")]]
    assert all(segment.damaged == segment.torn == 0 for segment in found)


def test_failed_writes_leave_no_empty_segments(log: Log, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                log.append([encode(row("too much"))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.glob("*/*.log")) == []
    log.append([encode(row("after"))])
    assert read_segment(segment_of(tmp_path)).rows == [row("after")]


def test_sealing_starts_a_new_segment(log: Log, tmp_path: Path) -> None:
    assert log.seal() == []
    log.append([encode(row("first"))])
    (sealed,) = log.seal()
    log.append([encode(row("second"))])
    assert read_segment(sealed).rows == [row("first")]
    assert len(segments(sealed.parent)) == 2
    assert len(log.seal()) == 1


def test_a_log_in_use_is_not_abandoned(log: Log, tmp_path: Path) -> None:
    log.append([encode(row())])
    assert abandoned_logs(tmp_path) == []


def test_a_search_for_abandoned_logs_does_not_wait(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        assert abandoned_logs(tmp_path) is None


def test_the_log_of_a_killed_process_is_replayed_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.integration.test_db_log import *\n"
        "Log(Path(sys.argv[1])).append([encode(row('of the dead'))])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    (log,) = abandoned_logs(tmp_path) or []
    (path,) = segments(log.folder)
    assert read_segment(path).rows == [row("of the dead")]
    # It is locked until it is released.
    assert abandoned_logs(tmp_path) == []
    log.remove()
    log.release()
    assert abandoned_logs(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_released_log_is_found_again(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.append([encode(row())])
    log.close()
    for _ in range(2):
        (found,) = abandoned_logs(tmp_path) or []
        found.release()


def test_a_log_without_rows_leaves_no_files(tmp_path: Path) -> None:
    Log(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_check_writes_only_after_a_failure(log: Log, tmp_path: Path) -> None:
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    os.utime(folder, (0, 0))
    log.check(failed=False)
    assert folder.stat().st_mtime == 0
    log.check(failed=True)
    assert folder.stat().st_mtime > 0
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_check_notices_that_its_folder_is_gone(log: Log, tmp_path: Path) -> None:
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        log.check(failed=False)

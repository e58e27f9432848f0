"""The command `migrate`, on tables of every older shape."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path
from typing import Any, Final

import lancedb
import pyarrow as pa
import pytest

from llm_sidecar.db import (
    FEEDBACK,
    PROPOSALS,
    RUNS,
    SCORES,
    TABLES,
    HermesScoreSchema,
    Phi3FeedbackSchema,
    Store,
    cli_main,
)
from llm_sidecar.db.rows import KEYS
from llm_sidecar.db.schema import VERSION, arrow_schemas
from llm_sidecar.errors import DatabaseUnavailable
from tests.old_log import record, write_old_log
from tests.test_db import NOW

WRITTEN: Final = "2026-01-02T03:04:05.678901Z"
TICKS: Final = 1_767_323_045_678_901
"""`NOW` in microseconds since 1970."""
OLD_FEEDBACK: Final = {
    "transaction_id": "t-1",
    "timestamp": WRITTEN,
    "feedback_type": "rating",
    "feedback_content": "good",
}
OLD_RUN: Final = {
    "run_id": "r-1",
    "timestamp": WRITTEN,
    "input_query": "Long ABC",
    "final_output": "{}",
    "status": "success",
}
OF_VERSION_2: Final = {
    "transaction_id": "r-1",
    "timestamp": NOW,
    "prompt": "Long ABC",
    "proposal": '{"ticker":"ABC"}',
    "assessment": "Fine.",
    "score": 0.5,
    "model": "phi3",
    "adapter": None,
    "latencies": {"proposal": 0.25, "assessment": 0.5, "score": None},
}
"""A proposal without the columns of later versions."""
UNKNOWN_MASS: Final = {"answer_mass": None, "score_reliable": None}
SINCE_THEN: Final = {"grounded": None, "provenance": None, **UNKNOWN_MASS}
OLD_SCORE: Final = {"run_id": "r-1", "timestamp": WRITTEN, "score": 0.5, "rationale": "Fine."}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    return tmp_path / "db"


def write(folder: Path, table: str, rows: pa.Table | list[dict[str, Any]]) -> None:
    """Creates a table with the shape of its rows, as an older version did."""
    data = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    lancedb.connect(folder).create_table(table, data=data, mode="overwrite")


def read(folder: Path, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = lancedb.connect(folder).open_table(table).to_arrow().to_pylist()
    return rows


def opened(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows that the sidecar returns; it opens only tables of the current shape."""

    async def ask() -> list[dict[str, Any]]:
        store = await Store.open(folder, create=False)
        try:
            return await store.last(table, 0)
        finally:
            await store.close()

    return asyncio.run(ask())


def append(folder: Path, row: HermesScoreSchema | Phi3FeedbackSchema) -> None:
    async def once() -> None:
        store = Store(folder)
        store.start()
        await store.append(row)
        await store.close()

    asyncio.run(once())


def scored_at(times: pa.Array) -> pa.Table:
    numbers = range(len(times))
    return pa.table(
        {
            "run_id": [str(number) for number in numbers],
            "timestamp": times,
            "score": [0.5 for _ in numbers],
            "rationale": ["" for _ in numbers],
        }
    )


def ticks(values: list[int], unit: str, tz: str | None = None) -> pa.Array:
    return pa.array(values, pa.timestamp(unit, tz))


MILLISECOND: Final = NOW.replace(microsecond=678_000)
SECOND: Final = NOW.replace(microsecond=0)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (
            pa.array(
                [
                    WRITTEN,
                    "2026-01-02T05:04:05.678901+02:00",
                    "2026-01-02T03:04:05.678901",
                    "2026-01-02 03:04:05.678901",
                    " 2026-01-02T03:04:05.678901234Z\n",
                ]
            ),
            NOW,
        ),
        (ticks([TICKS], "us"), NOW),
        (ticks([TICKS], "us", "UTC"), NOW),
        (ticks([TICKS], "us", "+02:00"), NOW),
        (ticks([TICKS * 1000 + 234], "ns"), NOW),
        (ticks([TICKS * 1000 + 234], "ns", "Europe/Berlin"), NOW),
        (ticks([TICKS // 1000], "ms"), MILLISECOND),
        (ticks([TICKS // 1000], "ms", "UTC"), MILLISECOND),
        (ticks([TICKS // 10**6], "s"), SECOND),
        (pa.array([TICKS * 1000, TICKS]), NOW),
        (pa.array([TICKS / 1e6]), NOW),
        (pa.array([TICKS // 1000]), MILLISECOND),
        (pa.array([TICKS // 10**6]), SECOND),
        (pa.array([f"{TICKS / 1e6}", str(TICKS)]), NOW),
        # Its digits are also an ISO 8601 time of the year 1711.
        (
            pa.array(["1711111141234"]),
            datetime.datetime(2024, 3, 22, 12, 39, 1, 234_000, datetime.UTC),
        ),
        (pa.array([NOW.date()]), datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)),
        (pa.array(["20260102"]), datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)),
    ],
    ids=[
        "text", "us", "us-utc", "us-offset", "ns", "ns-zone", "ms", "ms-utc", "s", "epoch-ns-us",
        "epoch-float", "epoch-ms", "epoch-s", "epoch-text", "epoch-like-date", "date", "date-text",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("in_tokyo")
def test_every_format_of_a_time_is_converted_to_the_same_time(
    folder: Path, times: pa.Array, expected: datetime.datetime
) -> None:
    write(folder, SCORES, scored_at(times))
    assert cli_main(["migrate"]) == 0
    rows = opened(folder, SCORES)
    assert [row["timestamp"] for row in rows] == [expected] * len(times)


@pytest.mark.parametrize(
    "times",
    [
        pa.array(["at noon", None, "", "9999-12-31T23:00:00-05:00", "nan", "1e300"]),
        pa.array([float("nan"), float("inf"), 9e15, None]),
        ticks([2**62], "s"),
    ],
    ids=["text", "number", "year"],
)
def test_a_row_with_an_unreadable_time_is_kept_and_reported(
    folder: Path, times: pa.Array, capsys: pytest.CaptureFixture[str]
) -> None:
    readable = sum(value == 9e15 for value in times.to_pylist()) if len(times) > 1 else 0
    write(folder, SCORES, scored_at(times))
    assert cli_main(["migrate"]) == 0
    found = [row["timestamp"].year for row in opened(folder, SCORES)]
    assert found.count(1970) == len(times) - readable
    message = f"{len(times) - readable} of them, without a readable time, now of 1970"
    assert message in capsys.readouterr().out


def test_the_first_shape_is_migrated_to_the_current_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, FEEDBACK, [OLD_FEEDBACK])
    write(folder, RUNS, [OLD_RUN])
    write(folder, SCORES, [OLD_SCORE])
    assert cli_main(["migrate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"phi3_feedback: 1 rows brought to version {VERSION}, "
        "with schema_version and corrected_proposal and feedback_id and received and source and "
        "author and row_id added"
    )
    assert lines[1].startswith(
        f"orchestrator_runs: 1 rows brought to version {VERSION}, "
        "with error_message and row_id added"
    )
    assert lines[2].startswith(
        f"hermes_scores: 1 rows brought to version {VERSION}, "
        "with answer_mass and score_reliable and row_id added"
    )
    assert lines[3:] == [
        f"{table}: created, as it was not there." for table in ("proposals", "feedback_withdrawals")
    ]
    (stored,) = opened(folder, FEEDBACK)
    assert len(stored.pop("feedback_id")) == 64
    assert stored == OLD_FEEDBACK | {
        "timestamp": NOW,
        "schema_version": "1.0",
        "corrected_proposal": None,
        "received": NOW,
        "source": "direct",
        "author": None,
    }
    assert opened(folder, RUNS) == [OLD_RUN | {"timestamp": NOW, "error_message": None}]
    assert opened(folder, SCORES) == [OLD_SCORE | {"timestamp": NOW} | UNKNOWN_MASS]


def write_version_2(folder: Path) -> None:
    """The proposals of version 2."""
    today = arrow_schemas()[PROPOSALS]
    schema = pa.schema(
        [field for field in today if field.name not in SINCE_THEN],
        metadata={"osiris_schema_version": "2"},
    )
    rows = [OF_VERSION_2 | {"row_id": "key"}]
    write(folder, PROPOSALS, pa.Table.from_pylist(rows, schema=schema))


def test_a_proposal_of_version_2_keeps_all_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_version_2(folder)
    with pytest.raises(DatabaseUnavailable, match=r"proposals has the shape of an older version"):
        asyncio.run(Store.open(folder))
    assert cli_main(["migrate"]) == 0
    message = (
        f"proposals: 1 rows brought to version {VERSION}, "
        "with grounded and provenance and answer_mass and score_reliable added; the"
    )
    assert message in capsys.readouterr().out
    assert read(folder, PROPOSALS) == [OF_VERSION_2 | {"row_id": "key"} | SINCE_THEN]
    assert opened(folder, PROPOSALS) == [OF_VERSION_2 | SINCE_THEN]


def test_rows_in_a_log_of_version_2_are_read_after_migration(folder: Path) -> None:
    write_version_2(folder)
    write_old_log(
        folder / "_log", record(PROPOSALS, OF_VERSION_2 | {"prompt": "late", "row_id": "late"})
    )
    assert cli_main(["migrate"]) == 0
    rows = sorted(opened(folder, PROPOSALS), key=lambda row: str(row["prompt"]))
    assert rows == [
        OF_VERSION_2 | SINCE_THEN,
        OF_VERSION_2 | {"prompt": "late"} | SINCE_THEN,
    ]


def test_a_migrated_database_is_readable_and_sound(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, RUNS, [OLD_RUN])
    assert cli_main(["migrate"]) == 0
    capsys.readouterr()
    assert cli_main(["query-runs"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == "r-1"
    assert cli_main(["query-runs", "--table", "proposals"]) == 0
    assert cli_main(["verify"]) == 0


@pytest.mark.parametrize("create", [False, True])
def test_opening_an_old_table_fails_with_instructions(folder: Path, create: bool) -> None:
    write(folder, RUNS, [OLD_RUN])
    write(folder, FEEDBACK, [OLD_FEEDBACK])
    message = r"phi3_feedback has the shape of an older .*llm_sidecar\.db migrate"
    with pytest.raises(DatabaseUnavailable, match=message):
        asyncio.run(Store.open(folder, create=create))
    assert read(folder, RUNS) == [OLD_RUN]


def test_a_table_of_a_later_version_is_neither_opened_nor_migrated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, RUNS, [OLD_RUN])

    async def say_it_is_of_version_9() -> None:
        connection = await lancedb.connect_async(folder)
        later = arrow_schemas()[RUNS].with_metadata({"osiris_schema_version": "9"})
        await connection.create_table(RUNS, schema=later, mode="overwrite")

    asyncio.run(say_it_is_of_version_9())
    with pytest.raises(DatabaseUnavailable, match="update the sidecar"):
        asyncio.run(Store.open(folder))
    assert cli_main(["migrate"]) == 1
    assert "update the sidecar" in capsys.readouterr().err


def test_feedback_ids_are_kept_and_missing_keys_added(folder: Path) -> None:
    at = {"timestamp": NOW}
    last = {"schema_version": "1.0", "corrected_proposal": '{"n":1}', "feedback_id": "mine"}
    write(folder, FEEDBACK, [OLD_FEEDBACK | at | last])
    write(folder, RUNS, [OLD_RUN | at | {"error_message": "late"}] * 2)
    write(folder, SCORES, [OLD_SCORE | at] * 2)
    assert cli_main(["migrate"]) == 0
    assert opened(folder, FEEDBACK) == [
        OLD_FEEDBACK | at | last | {"received": NOW, "source": "direct", "author": None}
    ]
    assert opened(folder, RUNS) == [OLD_RUN | at | {"error_message": "late"}] * 2
    for table in (RUNS, SCORES):
        keys = {row["row_id"] for row in read(folder, table)}
        assert len(keys) == 2
        assert "" not in keys


@pytest.fixture
def version_2(folder: Path) -> Path:
    """A database of version 2 with feedback from the future, and more feedback in the log of a dead
    process."""
    schemas = {
        FEEDBACK: without(FEEDBACK, "received", "source", "author", "row_id"),
        RUNS: without(RUNS),
        SCORES: without(SCORES),
        PROPOSALS: without(PROPOSALS, *SINCE_THEN),
    }
    feedback = OLD_FEEDBACK | {"schema_version": "1.0", "corrected_proposal": None}
    future = NOW.replace(year=2099)
    rows = {
        FEEDBACK: [
            feedback | {"timestamp": NOW, "feedback_id": "f-1"},
            feedback | {"timestamp": future, "feedback_id": "f-2"},
        ],
        RUNS: [OLD_RUN | {"timestamp": NOW, "error_message": None, "row_id": "r"}],
    }
    for table, schema in schemas.items():
        write(folder, table, pa.Table.from_pylist(rows.get(table, []), schema=schema))
    logged = feedback | {"timestamp": NOW, "feedback_id": "f-3"}
    write_old_log(folder / "_log", record(FEEDBACK, logged))
    return folder


def without(table: str, *columns: str, version: str = "2") -> pa.Schema:
    """The schema of a table without these columns."""
    schema = arrow_schemas()[table]
    kept = [field for field in schema if field.name not in columns]
    return pa.schema(kept, metadata={"osiris_schema_version": version})


def test_version_3_loses_no_row_of_its_tables_and_logs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = {"received": NOW, "source": "bus"}
    feedback = OLD_FEEDBACK | later | {"schema_version": "1.0", "corrected_proposal": None}
    stored, logged = (
        feedback | {"timestamp": NOW, "feedback_id": key, "row_id": f"bus:{key}"}
        for key in ("f-1", "f-2")
    )
    for table in TABLES:
        shape = without(table, *(["author"] if table == FEEDBACK else []), version="3")
        rows = [stored] if table == FEEDBACK else []
        write(folder, table, pa.Table.from_pylist(rows, schema=shape))
    write_old_log(folder / "_log", record(FEEDBACK, logged))
    with pytest.raises(DatabaseUnavailable, match=r"llm_sidecar\.db migrate"):
        asyncio.run(Store.open(folder))
    assert cli_main(["migrate"]) == 0
    message = (
        f"phi3_feedback: 1 rows brought to version {VERSION}, with author added; the old table"
    )
    assert message in capsys.readouterr().out
    # Opening the database moves the logged row to its table.
    assert len(opened(folder, FEEDBACK)) == 2
    rows = sorted(read(folder, FEEDBACK), key=lambda row: str(row["feedback_id"]))
    assert rows == [stored | {"author": None}, logged | {"author": None}]


def test_a_proposal_of_version_4_keeps_all_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [OF_VERSION_2 | {"row_id": "key", "grounded": "ticker"}]
    shape = without(PROPOSALS, "provenance", *UNKNOWN_MASS, version="4")
    write(folder, PROPOSALS, pa.Table.from_pylist(rows, schema=shape))
    assert cli_main(["migrate"]) == 0
    message = (
        f"proposals: 1 rows brought to version {VERSION}, "
        "with provenance and answer_mass and score_reliable added; the old"
    )
    assert message in capsys.readouterr().out
    assert read(folder, PROPOSALS) == [rows[0] | {"provenance": None, **UNKNOWN_MASS}]


def write_version_5(folder: Path) -> None:
    """A score and a proposal of version 5, and the other tables."""
    of_version_5 = {
        SCORES: OLD_SCORE | {"timestamp": NOW, "row_id": "s"},
        PROPOSALS: OF_VERSION_2 | {"grounded": "true", "provenance": None, "row_id": "p"},
    }
    for table in TABLES:
        shape = without(table, *UNKNOWN_MASS, version="5")
        rows = [of_version_5[table]] if table in of_version_5 else []
        write(folder, table, pa.Table.from_pylist(rows, schema=shape))


def test_scores_of_version_5_count_as_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_version_5(folder)
    with pytest.raises(DatabaseUnavailable, match=r"has the shape of an older version"):
        asyncio.run(Store.open(folder))
    assert cli_main(["migrate"]) == 0
    output = capsys.readouterr().out
    for table in (SCORES, PROPOSALS):
        assert (
            f"{table}: 1 rows brought to version {VERSION}, with answer_mass and score_reliable "
            "added; the"
        ) in output
    assert opened(folder, SCORES) == [OLD_SCORE | {"timestamp": NOW} | UNKNOWN_MASS]
    (proposal,) = opened(folder, PROPOSALS)
    assert {name: proposal[name] for name in ("score", *UNKNOWN_MASS)} == {
        "score": 0.5,
        **UNKNOWN_MASS,
    }

    async def mean() -> tuple[float | None, int]:
        store = await Store.open(folder, create=False)
        try:
            return await store.mean_score_since(NOW)
        finally:
            await store.close()

    assert asyncio.run(mean()) == (0.5, 1)


def test_opening_version_2_fails_with_instructions(version_2: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match=r"llm_sidecar\.db migrate"):
        asyncio.run(Store.open(version_2))
    assert [row["feedback_id"] for row in read(version_2, FEEDBACK)] == ["f-1", "f-2"]


def test_version_2_loses_no_row_of_its_tables_and_logs(version_2: Path) -> None:
    before = datetime.datetime.now(datetime.UTC)
    assert cli_main(["migrate"]) == 0
    rows = {row["feedback_id"]: row for row in opened(version_2, FEEDBACK)}
    assert sorted(rows) == ["f-1", "f-2", "f-3"]
    assert [row["source"] for row in rows.values()] == ["direct"] * 3
    assert rows["f-1"]["received"] == rows["f-3"]["received"] == NOW
    # It must not remain the newest for decades.
    assert rows["f-2"]["timestamp"].year == 2099
    assert before <= rows["f-2"]["received"] <= datetime.datetime.now(datetime.UTC)
    assert [row["run_id"] for row in opened(version_2, RUNS)] == ["r-1"]
    assert sorted(row["row_id"] for row in read(version_2, FEEDBACK)) == ["f-1", "f-2", "f-3"]
    assert [path.suffix for path in (version_2 / "_log" / "set_aside").iterdir()] == [".lance"] * 4


def test_feedback_that_is_delivered_again_after_migration_is_stored_once(folder: Path) -> None:
    write(folder, FEEDBACK, [OLD_FEEDBACK])
    assert cli_main(["migrate"]) == 0
    append(folder, Phi3FeedbackSchema.model_validate(OLD_FEEDBACK))
    assert len(opened(folder, FEEDBACK)) == 1


@pytest.mark.parametrize("key", [{}, {"feedback_id": "same"}, {"feedback_id": ""}])
def test_duplicate_rows_are_kept_with_new_keys(folder: Path, key: dict[str, str]) -> None:
    write(folder, FEEDBACK, [OLD_FEEDBACK | key] * 3)
    assert cli_main(["migrate"]) == 0
    rows = opened(folder, FEEDBACK)
    assert len({row["feedback_id"] for row in rows}) == len(rows) == 3


def test_objects_in_struct_columns_become_their_original_json(folder: Path) -> None:
    proposal = {"ticker": "ABC", "new_stop_pct": 2.5, "legs": [{"size": 1}]}
    contents = [{"stars": 5}, {"why": {"market": "thin"}}, {"stars": 0}, {"stars": 1}]
    corrected = [proposal, {"ticker": "X", "side": "LONG", "new_stop_pct": float("nan")}, {}, None]
    rows = [
        OLD_FEEDBACK | {"transaction_id": str(n), "feedback_content": c, "corrected_proposal": p}
        for n, (c, p) in enumerate(zip(contents, corrected, strict=True))
    ]
    write(folder, FEEDBACK, rows)
    assert cli_main(["migrate"]) == 0
    found = {row["transaction_id"]: row for row in opened(folder, FEEDBACK)}
    assert [json.loads(found[str(n)]["feedback_content"]) for n in range(4)] == contents
    assert json.loads(found["0"]["corrected_proposal"]) == proposal
    # pandas writes a missing number as NaN, which JSON does not have.
    assert json.loads(found["1"]["corrected_proposal"]) == {"ticker": "X", "side": "LONG"}
    assert [found[n]["corrected_proposal"] for n in "23"] == [None, None]


def test_null_becomes_a_default_in_a_required_column(folder: Path) -> None:
    write(
        folder,
        FEEDBACK,
        [
            OLD_FEEDBACK | {"schema_version": "0.9"},
            {"transaction_id": "t-2", "timestamp": WRITTEN, "schema_version": None},
        ],
    )
    write(folder, RUNS, [OLD_RUN, {"run_id": "r-2", "error_message": None}])
    write(
        folder,
        SCORES,
        [OLD_SCORE, OLD_SCORE | {"score": None}, OLD_SCORE | {"score": float("nan")}],
    )
    assert cli_main(["migrate"]) == 0
    by_id = {row["transaction_id"]: row for row in opened(folder, FEEDBACK)}
    assert by_id["t-1"]["schema_version"] == "0.9"
    assert by_id["t-2"]["schema_version"] == "1.0"
    assert by_id["t-2"]["feedback_type"] == by_id["t-2"]["feedback_content"] == ""
    (run,) = (row for row in opened(folder, RUNS) if row["run_id"] == "r-2")
    assert (run["input_query"], run["status"], run["error_message"]) == ("", "", None)
    # -1 is the score of a failed scoring.
    assert sorted(row["score"] for row in opened(folder, SCORES)) == [-1.0, -1.0, 0.5]


def test_an_invalid_correction_does_not_affect_others(folder: Path) -> None:
    texts = ["{'ticker': 'ABC'}", "null", "", "[" * 100_000, '{"ticker":"ABC"}']
    rows = [
        OLD_FEEDBACK
        | {"transaction_id": str(number), "corrected_proposal": text, "feedback_id": f"f-{number}"}
        for number, text in enumerate(texts)
    ]
    write(folder, FEEDBACK, rows)
    write(folder, RUNS, [OLD_RUN | {"run_id": str(number)} for number in range(len(texts))])
    assert cli_main(["migrate"]) == 0

    async def ask() -> list[Any]:
        store = await Store.open(folder)
        try:
            return list(await store.recent_corrections(9))
        finally:
            await store.close()

    assert asyncio.run(ask()) == [("Long ABC", {"ticker": "ABC"}, "4", "f-4")]


def test_numbers_and_texts_in_swapped_columns_are_converted(folder: Path) -> None:
    write(folder, SCORES, [OLD_SCORE | {"run_id": 7, "score": "0.25"}])
    assert cli_main(["migrate"]) == 0
    expected = OLD_SCORE | {"run_id": "7", "score": 0.25, "timestamp": NOW} | UNKNOWN_MASS
    assert opened(folder, SCORES) == [expected]


def test_an_unknown_column_is_dropped_reported_and_kept_in_the_copy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = pa.Table.from_pylist([OLD_SCORE])
    old = old.append_column("heard_at", ticks([TICKS * 1000 + 1], "ns"))
    write(folder, SCORES, old.append_column("mood", pa.array(["calm"])))
    assert cli_main(["migrate"]) == 0
    assert opened(folder, SCORES) == [OLD_SCORE | {"timestamp": NOW} | UNKNOWN_MASS]
    line = capsys.readouterr().out.splitlines()[-3]
    assert ", without heard_at and mood; the old table is kept as " in line
    (kept,) = (folder / "_log" / "set_aside").iterdir()
    assert line.endswith(f"{kept.name}.")
    assert (
        lancedb.connect(kept.parent)
        .open_table(kept.stem)
        .to_arrow()
        .equals(old.append_column("mood", pa.array(["calm"])))
    )


def test_every_row_of_a_large_table_is_migrated(folder: Path) -> None:
    write(folder, SCORES, [OLD_SCORE | {"run_id": str(number)} for number in range(10_000)])
    assert cli_main(["migrate"]) == 0
    assert {int(row["run_id"]) for row in read(folder, SCORES)} == set(range(10_000))


def test_an_empty_table_is_migrated(folder: Path) -> None:
    write(folder, SCORES, pa.Table.from_pylist([OLD_SCORE]).slice(1))
    assert cli_main(["migrate"]) == 0
    append(folder, HermesScoreSchema(run_id="new", score=1.0))
    assert [row["run_id"] for row in opened(folder, SCORES)] == ["new"]


def test_a_second_migration_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, SCORES, [OLD_SCORE] * 3)
    assert cli_main(["migrate"]) == 0
    capsys.readouterr()
    before = {table: (read(folder, table), version(folder, table)) for table in TABLES}
    assert cli_main(["migrate"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{table}: nothing to do, {3 if table == SCORES else 0} rows are of version {VERSION}."
        for table in TABLES
    ]
    assert {table: (read(folder, table), version(folder, table)) for table in TABLES} == before
    assert len(list((folder / "_log" / "set_aside").iterdir())) == 1


def version(folder: Path, table: str) -> int:
    return int(lancedb.connect(folder).open_table(table).version)


def test_the_key_of_every_table_is_marked_so_that_equal_inserts_conflict(folder: Path) -> None:
    for table, row in ((FEEDBACK, OLD_FEEDBACK), (RUNS, OLD_RUN), (SCORES, OLD_SCORE)):
        write(folder, table, [row])
    assert cli_main(["migrate"]) == 0
    for table in TABLES:
        field = lancedb.connect(folder).open_table(table).schema.field(KEYS[table])
        assert field.metadata == {b"lance-schema:unenforced-primary-key": b"true"}


def test_rows_that_arrived_before_migration_are_stored_after_it(folder: Path) -> None:
    write(folder, SCORES, [OLD_SCORE])
    append(folder, HermesScoreSchema(run_id="early", timestamp=NOW, score=0.25))
    assert len(read(folder, SCORES)) == 1
    assert cli_main(["migrate"]) == 0
    assert sorted(row["run_id"] for row in opened(folder, SCORES)) == ["early", "r-1"]


def written(folder: Path) -> dict[Path, int]:
    """The modification time of each file of a table."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.lance/**/*")}


async def test_a_database_in_use_is_not_migrated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = await Store.open(folder)
    write(folder, SCORES, [OLD_SCORE])
    before = written(folder)
    status = await asyncio.to_thread(cli_main, ["migrate"])
    assert written(folder) == before
    assert status == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "Another process uses the database; stop it and migrate again.\n"
    assert not (folder / "_log" / "set_aside").exists()
    await store.close()
    assert await asyncio.to_thread(cli_main, ["migrate"]) == 0


def test_finished_tables_are_reported_even_if_a_later_one_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, FEEDBACK, [OLD_FEEDBACK])
    write(folder, RUNS, [OLD_RUN])
    (data,) = (folder / f"{RUNS}.lance" / "data").iterdir()
    data.write_bytes(b"x" * data.stat().st_size)
    assert cli_main(["migrate"]) == 1
    output = capsys.readouterr()
    (done,) = output.out.splitlines()
    assert done.startswith(f"{FEEDBACK}: 1 rows brought")
    assert len(output.err.splitlines()) == 1
    assert version(folder, RUNS) == 1
    assert [path.name.split("-")[1] for path in (folder / "_log" / "set_aside").iterdir()] == [
        FEEDBACK
    ]


def test_a_table_that_cannot_be_copied_is_unchanged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, SCORES, [OLD_SCORE])
    (folder / "_log").mkdir()
    (folder / "_log" / "set_aside").write_text("in the way")
    assert cli_main(["migrate"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert read(folder, SCORES) == [OLD_SCORE]


def test_without_a_database_migration_fails_and_creates_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_main(["migrate"]) == 1
    assert "There is no database" in capsys.readouterr().err
    assert not folder.exists()

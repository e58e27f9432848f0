"""Rows as the journal keeps them, and as LanceDB takes them."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from llm_sidecar.db import FEEDBACK, RUNS, SCORES
from llm_sidecar.db.encoding import decoded, encoded, values_of
from llm_sidecar.db.rows import HermesScoreSchema, Phi3FeedbackSchema
from llm_sidecar.journal.rows import Entry

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)


def score(name: str, **changes: Any) -> dict[str, Any]:
    row = HermesScoreSchema(run_id=name, timestamp=NOW, score=0.5).as_row()
    return row | {"row_id": name} | changes


def test_a_row_is_json_text_with_the_key_of_its_table() -> None:
    entry = encoded(SCORES, score("é", rationale="価 🚀\n"))
    assert (entry.target, entry.key, entry.again) == (SCORES, "é", False)
    assert entry.data.decode() == (
        '{"timestamp":"2026-01-02T03:04:05.678901+00:00","run_id":"é","score":0.5,'
        '"rationale":"価 🚀\\n","answer_mass":null,"score_reliable":null,"row_id":"é"}'
    )


def test_a_row_is_read_as_it_was_written() -> None:
    feedback = Phi3FeedbackSchema(
        transaction_id="t", feedback_type="rating", feedback_content={"stars": 5}, timestamp=NOW
    ).as_row()
    for table, row in ((FEEDBACK, feedback), (SCORES, score("a"))):
        assert values_of(table, encoded(table, row).data) == row


def test_rows_are_grouped_by_table_and_by_whether_they_may_be_there() -> None:
    again = encoded(SCORES, score("b"), again=True)
    found = decoded([encoded(SCORES, score("a")), again, encoded(SCORES, score("c"))])
    assert found.unreadable == []
    assert {key: table["run_id"].to_pylist() for key, table in found.tables.items()} == {
        (SCORES, False): ["a", "c"],
        (SCORES, True): ["b"],
    }


@pytest.mark.parametrize(
    ("table", "data"),
    [
        (SCORES, b"\xff"),
        (SCORES, b"[]"),
        (SCORES, b'{"run_id":'),
        (SCORES, json.dumps(score("x", timestamp="noon")).encode()),
        (SCORES, json.dumps(score("x", timestamp=NOW.isoformat(), mood="good")).encode()),
        (RUNS, encoded(SCORES, score("x")).data),
        ("moods", encoded(SCORES, score("x")).data),
        (SCORES, json.dumps(score("x", timestamp=NOW.isoformat(), score="high")).encode()),
        (SCORES, json.dumps(score("x", timestamp=NOW.isoformat(), run_id=None)).encode()),
    ],
)
def test_a_row_that_cannot_be_read_does_not_affect_others(table: str, data: bytes) -> None:
    bad = Entry(table, "x", data)
    found = decoded([encoded(SCORES, score("a")), bad, encoded(SCORES, score("b"))])
    assert found.unreadable == [bad]
    assert found.tables[SCORES, False]["run_id"].to_pylist() == ["a", "b"]

"""Which text columns contain objects, and how they are decoded."""

from __future__ import annotations

from typing import Any

import pytest

from llm_sidecar.db.nested import JSON_COLUMNS, json_object, with_objects
from llm_sidecar.db.rows import FEEDBACK, PROPOSALS, RUNS, SCORES, TABLES

TEXT = ' {"a": [1, {"b": null}]}'
OBJECT = {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    ("table", "column"), [(table, name) for table in JSON_COLUMNS for name in JSON_COLUMNS[table]]
)
def test_a_json_column_becomes_an_object(table: str, column: str) -> None:
    row = {"timestamp": 1, column: TEXT, "prompt": TEXT}
    assert with_objects(table, row) == {"timestamp": 1, column: OBJECT, "prompt": TEXT}
    assert list(with_objects(table, row)) == list(row)


def test_the_json_columns_are_those_with_objects() -> None:
    assert JSON_COLUMNS == {
        FEEDBACK: ("feedback_content", "corrected_proposal"),
        RUNS: ("final_output",),
        PROPOSALS: ("proposal", "provenance"),
    }


@pytest.mark.parametrize("table", TABLES)
def test_text_that_looks_like_json_stays_text(table: str) -> None:
    row = dict.fromkeys(("input_query", "prompt", "assessment", "rationale"), TEXT)
    assert with_objects(table, row) == row


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "words",
        "5",
        "[1]",
        '"{}"',
        "{",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a":' * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_other_values_stay_unchanged(text: str | None) -> None:
    assert with_objects(RUNS, {"final_output": text}) == {"final_output": text}


def test_a_struct_stays_as_it_is() -> None:
    row: dict[str, Any] = {"latencies": {"proposal": 0.5}, "score": 0.5}
    assert with_objects(SCORES, row) == row


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("{}", {}),
        ("", None),
        (None, None),
        ("null", None),
        ("[1]", None),
        ('"a"', None),
        ("7", None),
        ("{", None),
        ("plain words", None),
        ("[" * 100_000, None),
    ],
)
def test_only_an_object_is_decoded(text: str | None, found: object) -> None:
    assert json_object(text) == found

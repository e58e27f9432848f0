"""The Arrow schemas: columns, versions, and the id of a database."""

from __future__ import annotations

import datetime
from typing import Any

import pyarrow as pa
import pytest

from llm_sidecar.db import rows, schema
from llm_sidecar.db.rows import (
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    OrchestratorRunSchema,
    ProposalSchema,
)
from llm_sidecar.errors import DatabaseUnavailable
from tests.unit.test_db_rows import FEEDBACK, NOW, PROPOSAL, RUN, SCORE, feedback, published

# The tables


def test_each_table_has_the_columns_of_its_rows() -> None:
    made: dict[str, Any] = {
        "phi3_feedback": published(),
        "feedback_withdrawals": FeedbackWithdrawalSchema(feedback_id="f", transaction_id="t"),
        "orchestrator_runs": OrchestratorRunSchema(**RUN),
        "hermes_scores": HermesScoreSchema(**SCORE),
        "proposals": ProposalSchema(**PROPOSAL),
    }
    schemas = schema.arrow_schemas()
    assert set(made) == set(schemas) == set(rows.SCHEMAS)
    assert tuple(schemas) == rows.TABLES
    for table, row in made.items():
        assert set(row.as_row()) == set(schemas[table].names)
        # Arrow accepts the row unchanged.
        read = pa.Table.from_pylist([row.as_row()], schema=schemas[table]).to_pylist()
        assert read == [row.as_row()]


def test_the_table_names_are_those_of_the_contract() -> None:
    names: list[str] = [*rows.TABLES]
    assert names == [
        *("phi3_feedback", "orchestrator_runs", "hermes_scores", "proposals"),
        "feedback_withdrawals",
    ]
    assert {table: rows.KEYS[table] for table in names} == {
        **dict.fromkeys(names, "row_id"),
        "feedback_withdrawals": "feedback_id",
    }
    assert [rows.TRANSACTION[table] for table in names] == [
        *("transaction_id", "run_id", "run_id", "transaction_id", "transaction_id")
    ]


def test_only_the_current_schema_is_current() -> None:
    today = schema.arrow_schemas()["hermes_scores"]
    assert schema.is_current("hermes_scores", today) is True
    assert schema.is_current("proposals", today) is False
    assert schema.is_current("hermes_scores", today.with_metadata(None)) is False
    other = today.with_metadata({b"osiris_schema_version": b"1"})
    assert schema.is_current("hermes_scores", other) is False
    shorter = today.remove(0)
    assert schema.is_current("hermes_scores", shorter) is False


def version(text: bytes | None) -> pa.Schema:
    metadata = None if text is None else {b"osiris_schema_version": text}
    return schema.arrow_schemas()["hermes_scores"].with_metadata(metadata)


def test_a_table_of_an_earlier_version_can_be_read() -> None:
    for text in (None, b"1", schema.VERSION.encode()):
        schema.require_not_newer("hermes_scores", version(text))


@pytest.mark.parametrize("text", [str(int(schema.VERSION) + 1), "99", "two", "", "-1"])
def test_a_table_of_a_later_version_is_refused(text: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        schema.require_not_newer("hermes_scores", version(text.encode()))
    assert caught.value.detail == (
        f"The table hermes_scores is of version {text}, and this sidecar knows {schema.VERSION}; "
        "update the sidecar."
    )
    assert caught.value.retry_after == 30


# Rows of version 2


V2_FEEDBACK: dict[str, Any] = FEEDBACK | {
    "feedback_id": "f-1",
    "schema_version": "1.0",
    "corrected_proposal": None,
}


def test_a_row_of_version_2_gets_the_current_columns() -> None:
    assert schema.upgraded("phi3_feedback", V2_FEEDBACK) == V2_FEEDBACK | {
        "received": NOW,
        "source": "direct",
        "author": None,
        "row_id": "f-1",
    }
    proposal = ProposalSchema(**PROPOSAL).as_row()
    older = {name: value for name, value in proposal.items() if name != "grounded"}
    assert schema.upgraded("proposals", older) == older | {"grounded": None}


def test_a_row_of_version_3_has_no_author() -> None:
    row = feedback().as_row()
    older = {name: value for name, value in row.items() if name != "author"}
    assert schema.upgraded("phi3_feedback", older) == older | {"author": None}


def test_a_row_of_version_5_has_no_answer_mass() -> None:
    unknown = {"answer_mass": None, "score_reliable": None}
    for table, row in (
        ("proposals", ProposalSchema(**PROPOSAL).as_row()),
        ("hermes_scores", HermesScoreSchema(**SCORE).as_row()),
    ):
        older = {name: value for name, value in row.items() if name not in unknown}
        assert schema.upgraded(table, older) == older | unknown


def test_feedback_from_the_future_arrived_no_later_than_now() -> None:
    """Otherwise it would remain the newest until then."""
    ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    found = schema.upgraded("phi3_feedback", V2_FEEDBACK | {"timestamp": ahead})
    assert found is not None
    assert found["timestamp"] == ahead
    assert found["received"] <= datetime.datetime.now(datetime.UTC)


def test_a_current_row_is_unchanged() -> None:
    for table, row in (
        ("phi3_feedback", published(corrected_proposal={"a": 1}).as_row()),
        ("proposals", ProposalSchema(**PROPOSAL | {"grounded": "true"}).as_row()),
        (
            "hermes_scores",
            HermesScoreSchema(**SCORE, answer_mass=0.25, score_reliable=False).as_row(),
        ),
    ):
        assert schema.upgraded(table, row) == row


def test_any_other_row_is_not_upgraded() -> None:
    score = HermesScoreSchema(**SCORE).as_row()
    assert schema.upgraded("hermes_scores", score | {"mood": "good"}) is None
    assert schema.upgraded("hermes_scores", {"run_id": "r-1"}) is None
    assert schema.upgraded("moods", score) is None


def test_upgrading_does_not_change_the_given_row() -> None:
    row = dict(V2_FEEDBACK)
    schema.upgraded("phi3_feedback", row)
    assert row == V2_FEEDBACK


# The id of the database


def test_a_new_feedback_table_has_a_new_database_id() -> None:
    one, other = (schema.new_table_schema("phi3_feedback") for _ in range(2))
    name = schema.database_id(one)
    assert name is not None
    assert len(name) == 32
    assert schema.database_id(other) != name
    assert one.equals(schema.arrow_schemas()["phi3_feedback"])
    assert one.metadata[b"osiris_schema_version"] == b"6"


def test_a_table_without_a_database_id_has_none() -> None:
    for table in rows.TABLES:
        assert schema.database_id(schema.arrow_schemas()[table]) is None
    assert schema.database_id(pa.schema([])) is None
    assert schema.new_table_schema("proposals") is schema.arrow_schemas()["proposals"]

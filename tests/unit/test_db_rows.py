"""The models of rows: columns, keys, and what is refused."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from llm_sidecar.db.rows import (
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    Latencies,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    PublishedFeedback,
)

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
FEEDBACK: dict[str, Any] = {
    "transaction_id": "t-1",
    "timestamp": NOW,
    "feedback_type": "rating",
    "feedback_content": "good",
}
RUN: dict[str, Any] = {
    "run_id": "r-1",
    "timestamp": NOW,
    "input_query": "Long ABC",
    "final_output": "{}",
    "status": "success",
}
SCORE: dict[str, Any] = {"run_id": "r-1", "timestamp": NOW, "score": 0.5}
PROPOSAL: dict[str, Any] = {
    "transaction_id": "r-1",
    "timestamp": NOW,
    "prompt": "Long ABC",
    "proposal": {"ticker": "ABC"},
    "model": "phi3",
}


def feedback(**changes: Any) -> Phi3FeedbackSchema:
    return Phi3FeedbackSchema(**FEEDBACK | changes)


def published(**changes: Any) -> PublishedFeedback:
    return PublishedFeedback(**FEEDBACK | changes)


def columns(row: BaseModel, *left_out: str) -> dict[str, Any]:
    made: dict[str, Any] = row.as_row()  # type: ignore[attr-defined]
    return {name: value for name, value in made.items() if name not in left_out}


# Columns


def test_feedback_has_these_columns() -> None:
    row = columns(feedback(feedback_id="f-1"))
    expected = FEEDBACK | {
        "feedback_id": "f-1",
        "schema_version": "1.0",
        "corrected_proposal": None,
    }
    assert {name: row[name] for name in expected} == expected


def test_an_object_becomes_compact_json() -> None:
    row = feedback(
        feedback_content={"stars": 5, "why": ["ä", None, 1.5]},
        corrected_proposal={"ticker": "ABC", "new_stop_pct": None},
    ).as_row()
    assert row["feedback_content"] == '{"stars":5,"why":["\\u00e4",null,1.5]}'
    assert row["corrected_proposal"] == '{"ticker":"ABC","new_stop_pct":null}'
    assert feedback(feedback_content='{"a": 1}').as_row()["feedback_content"] == '{"a": 1}'


def test_a_run_a_score_and_a_proposal_have_these_columns() -> None:
    assert columns(OrchestratorRunSchema(**RUN), "row_id") == RUN | {"error_message": None}
    assert columns(HermesScoreSchema(**SCORE), "row_id") == SCORE | {
        "rationale": "",
        "answer_mass": None,
        "score_reliable": None,
    }
    row = columns(ProposalSchema(**PROPOSAL), "row_id")
    expected = PROPOSAL | {
        "proposal": '{"ticker":"ABC"}',
        "assessment": "",
        "score": None,
        "adapter": None,
        "latencies": {"proposal": None, "assessment": None, "score": None},
        "grounded": None,
        "provenance": None,
        "answer_mass": None,
        "score_reliable": None,
    }
    assert row == expected


def test_a_withdrawal_has_these_columns() -> None:
    values = {"feedback_id": "f-1", "transaction_id": "t-1", "timestamp": NOW}
    assert FeedbackWithdrawalSchema(**values).as_row() == values
    for name in ("feedback_id", "transaction_id"):
        with pytest.raises(ValidationError):
            FeedbackWithdrawalSchema(**values | {name: ""})


@pytest.mark.parametrize(
    ("model", "values"),
    [(OrchestratorRunSchema, RUN), (HermesScoreSchema, SCORE), (ProposalSchema, PROPOSAL)],
)
def test_each_row_has_a_unique_id_and_keeps_it(model: Any, values: dict[str, Any]) -> None:
    one, other = model(**values), model(**values)
    assert one.as_row()["row_id"] == one.as_row()["row_id"]
    assert one.as_row()["row_id"] != other.as_row()["row_id"]
    assert len(one.as_row()["row_id"]) == 32


# The key of feedback


def test_a_feedback_id_that_is_given_is_kept() -> None:
    assert feedback(feedback_id="f-1").as_row()["feedback_id"] == "f-1"


def test_the_default_feedback_id_is_a_hash_of_transaction_time_type_and_content() -> None:
    key = '["t-1", "2026-01-02 03:04:05.678901+00:00", "rating", "good"]'
    assert feedback().as_row()["feedback_id"] == hashlib.sha256(key.encode()).hexdigest()


def test_a_correction_changes_the_default_feedback_id() -> None:
    key = (
        '["t-1", "2026-01-02 03:04:05.678901+00:00", "rating", "good", "{\\"ticker\\":\\"ABC\\"}"]'
    )
    made = feedback(corrected_proposal={"ticker": "ABC"}).as_row()["feedback_id"]
    assert made == hashlib.sha256(key.encode()).hexdigest()


def test_published_feedback_replaces_no_row_of_ours() -> None:
    ours, theirs = feedback(feedback_id="f-1").as_row(), published(feedback_id="f-1").as_row()
    assert ours["feedback_id"] == theirs["feedback_id"] == "f-1"
    assert (ours["row_id"], ours["source"]) == ("f-1", "direct")
    assert (theirs["row_id"], theirs["source"]) == ("bus:f-1", "bus")
    # `stored_in` is not a column.
    assert published(stored_in="d-1").as_row().keys() == theirs.keys() == ours.keys()


def test_rows_arrive_in_order_of_creation() -> None:
    before = datetime.datetime.now(datetime.UTC)
    first, second = feedback(), feedback(timestamp=NOW - datetime.timedelta(days=1))
    received = [row.as_row()["received"] for row in (first, second)]
    assert before <= received[0] <= received[1] <= datetime.datetime.now(datetime.UTC)
    assert first.as_row()["received"] == received[0]
    with pytest.raises(ValidationError):
        feedback(received=NOW)
    with pytest.raises(ValidationError):
        feedback(source="bus")


@pytest.mark.parametrize(
    "changes",
    [
        {"transaction_id": "t-2"},
        {"timestamp": NOW + datetime.timedelta(microseconds=1)},
        {"feedback_type": "human_edit"},
        {"feedback_content": "Good"},
        {"feedback_content": {"good": 1}},
        {"corrected_proposal": {"ticker": "ABC"}},
        {"corrected_proposal": {}},
    ],
)
def test_other_feedback_has_another_id(changes: dict[str, Any]) -> None:
    assert feedback(**changes).as_row()["feedback_id"] != feedback().as_row()["feedback_id"]


def test_the_same_feedback_has_the_same_id() -> None:
    elsewhere = NOW.astimezone(datetime.timezone(datetime.timedelta(hours=9)))
    ids = {row.as_row()["feedback_id"] for row in (feedback(), feedback(timestamp=elsewhere))}
    assert len(ids) == 1


# Timestamps


@pytest.mark.parametrize(
    "written",
    [
        NOW.replace(tzinfo=None),
        NOW.astimezone(datetime.timezone(datetime.timedelta(hours=5))),
        "2026-01-02T03:04:05.678901",
        "2026-01-02T03:04:05.678901Z",
        "2026-01-02T05:04:05.678901+02:00",
    ],
)
def test_a_timestamp_is_kept_as_utc(written: Any) -> None:
    kept = HermesScoreSchema(**SCORE | {"timestamp": written}).timestamp
    assert (kept, kept.tzinfo) == (NOW, datetime.UTC)


@pytest.mark.parametrize("given", [{}, {"timestamp": None}])
def test_the_default_timestamp_is_now(given: dict[str, Any]) -> None:
    before = datetime.datetime.now(datetime.UTC)
    made = HermesScoreSchema(run_id="r", score=1.0, **given).timestamp
    assert before <= made <= datetime.datetime.now(datetime.UTC)
    assert made.tzinfo is datetime.UTC


@pytest.mark.parametrize("written", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00"])
def test_a_time_that_utc_cannot_hold_is_refused(written: str) -> None:
    with pytest.raises(ValidationError) as caught:
        HermesScoreSchema(**SCORE | {"timestamp": written})
    (error,) = caught.value.errors()
    assert error["msg"] == "Value error, in UTC it lies outside the years 1 to 9999"


# Refused values


@pytest.mark.parametrize(
    "changes",
    [
        {"feedback_type": "shout"},
        {"transaction_id": ""},
        {"feedback_id": ""},
        {"feedback_id": "x" * 129},
        {"timestamp": "noon"},
        {"feedback_content": 3},
        {"feedback_content": None},
        {"corrected_proposal": "pass"},
        {"corrected_proposal": []},
        {"other": 1},
    ],
)
def test_invalid_feedback_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        feedback(**changes)


@pytest.mark.parametrize("kind", ["correction", "rating", "qualitative_comment", "human_edit"])
def test_the_types_of_feedback_are_fixed(kind: str) -> None:
    assert feedback(feedback_type=kind, feedback_id="x" * 128).feedback_type == kind


@pytest.mark.parametrize("field", ["feedback_content", "corrected_proposal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), NOW, {1, 2}, b"x"])
def test_a_value_that_is_not_json_is_refused_at_any_depth(field: str, value: object) -> None:
    for nested in ({"a": value}, {"a": [{"b": [value]}]}):
        with pytest.raises(ValidationError):
            feedback(**{field: nested})


def nest(levels: int, *, in_lists: bool) -> dict[str, Any]:
    """An object with this many levels."""
    inner: Any = 1
    for _ in range(levels - 1):
        inner = [inner] if in_lists else {"a": inner}
    return {"a": inner}


@pytest.mark.parametrize("in_lists", [False, True])
def test_an_object_may_be_64_deep(in_lists: bool) -> None:
    deepest = nest(64, in_lists=in_lists)
    assert feedback(corrected_proposal=deepest).corrected_proposal == deepest
    for levels in (65, 100_000):
        with pytest.raises(ValidationError):
            feedback(corrected_proposal=nest(levels, in_lists=in_lists))


def test_breadth_does_not_count_as_depth() -> None:
    wide: dict[str, Any] = {str(n): {"a": [n]} for n in range(1000)}
    assert feedback(corrected_proposal=wide).corrected_proposal == wide
    with pytest.raises(ValidationError):
        feedback(corrected_proposal=wide | {"deep": nest(64, in_lists=False)})


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (OrchestratorRunSchema, RUN | {"run_id": ""}),
        (OrchestratorRunSchema, RUN | {"status": ""}),
        (OrchestratorRunSchema, RUN | {"input_query": "\ud800"}),
        (OrchestratorRunSchema, RUN | {"other": 1}),
        (HermesScoreSchema, SCORE | {"run_id": ""}),
        (HermesScoreSchema, SCORE | {"score": -0.01}),
        (HermesScoreSchema, SCORE | {"score": 1.01}),
        (HermesScoreSchema, SCORE | {"score": float("nan")}),
        (HermesScoreSchema, SCORE | {"score": None}),
        (HermesScoreSchema, SCORE | {"score": True}),
        (HermesScoreSchema, SCORE | {"score": "0.5"}),
        (HermesScoreSchema, SCORE | {"answer_mass": -0.01}),
        (HermesScoreSchema, SCORE | {"answer_mass": 1.01}),
        (HermesScoreSchema, SCORE | {"answer_mass": float("nan")}),
        (HermesScoreSchema, SCORE | {"answer_mass": True}),
        (HermesScoreSchema, SCORE | {"score_reliable": 1}),
        (HermesScoreSchema, SCORE | {"score_reliable": "true"}),
        (ProposalSchema, PROPOSAL | {"answer_mass": 1.01}),
        (ProposalSchema, PROPOSAL | {"score_reliable": 0}),
        (ProposalSchema, PROPOSAL | {"score": "0.5"}),
        (ProposalSchema, PROPOSAL | {"latencies": {"score": True}}),
        (ProposalSchema, PROPOSAL | {"transaction_id": ""}),
        (ProposalSchema, PROPOSAL | {"score": 1.01}),
        (ProposalSchema, PROPOSAL | {"score": -0.01}),
        (ProposalSchema, PROPOSAL | {"proposal": "pass"}),
        (ProposalSchema, PROPOSAL | {"model": None}),
        (Latencies, {"proposal": -0.1}),
        (Latencies, {"assessment": float("inf")}),
        (Latencies, {"score": float("nan")}),
        (Latencies, {"other": 1.0}),
    ],
)
def test_an_invalid_row_is_refused(model: type[BaseModel], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model(**values)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_score_may_be_0_or_1(score: float) -> None:
    assert HermesScoreSchema(**SCORE | {"score": score}).score == score
    assert ProposalSchema(**PROPOSAL | {"score": score}).score == score


def test_a_row_is_frozen() -> None:
    with pytest.raises(ValidationError):
        HermesScoreSchema(**SCORE).score = 0.7  # type: ignore[misc]


def test_only_the_server_sets_the_author() -> None:
    written = feedback(feedback_id="f-1")
    signed = written.written_by("desk")
    assert signed.as_row() == written.as_row() | {"author": "desk"}
    assert written.as_row()["author"] is None
    with pytest.raises(ValidationError):
        feedback(author="desk")
    # The author in a message is ignored; our own events have one.
    assert published(author="desk").as_row()["author"] is None

"""The payload of each event, and the CloudEvent that carries it."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from llm_sidecar import timestamps
from llm_sidecar.db import PublishedFeedback
from llm_sidecar.services.events import (
    PAYLOADS,
    RECEIVED,
    AdapterSwapped,
    FeedbackSubmitted,
    ProposalAssessed,
    ProposalCreated,
    cloud_event,
)
from llm_sidecar.telemetry.trace_context import is_traceparent, traceparent

NAME = uuid.UUID("17c223bb-3645-4fda-b3c6-b0090e90b109")
MOMENT = datetime.datetime(2026, 1, 31, 10, 0, 0, 123456, tzinfo=datetime.UTC)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

EVENTS: dict[str, tuple[BaseModel, dict[str, object]]] = {
    "phi3.proposal.created": (
        # The side is not known.
        ProposalCreated(
            ticker="ABC",
            action="pass",
            new_stop_pct=None,
            confidence=0.5,
            rationale="Nothing to do.",
            transaction_id=NAME,
        ),
        {
            "ticker": "ABC",
            "action": "pass",
            "new_stop_pct": None,
            "confidence": 0.5,
            "rationale": "Nothing to do.",
            "transaction_id": str(NAME),
        },
    ),
    "phi3.proposal.assessed": (
        ProposalAssessed(
            proposal_transaction_id=NAME,
            assessment_text="Thin.",
            timestamp=MOMENT,
            score=0.75,
            answer_mass=0.5,
        ),
        {
            "proposal_transaction_id": str(NAME),
            "assessment_text": "Thin.",
            "timestamp": "2026-01-31T10:00:00.123456+00:00",
            "score": 0.75,
            "answer_mass": 0.5,
        },
    ),
    "phi3.feedback.submitted": (
        FeedbackSubmitted(
            timestamp=MOMENT,
            feedback_id="f-1",
            transaction_id="t-1",
            feedback_type="rating",
            feedback_content={"stars": 4},
            schema_version="1.0",
            corrected_proposal=None,
            stored_in="d-1",
        ),
        {
            "timestamp": "2026-01-31T10:00:00.123456Z",
            "feedback_id": "f-1",
            "transaction_id": "t-1",
            "feedback_type": "rating",
            "feedback_content": {"stars": 4},
            "schema_version": "1.0",
            "corrected_proposal": None,
            "stored_in": "d-1",
        },
    ),
    "phi3.adapter.swapped": (
        AdapterSwapped(adapter=None, previous="20260101", timestamp=MOMENT),
        {
            "adapter": None,
            "previous": "20260101",
            "timestamp": "2026-01-31T10:00:00.123456+00:00",
        },
    ),
}


@pytest.fixture
def trace() -> Iterator[None]:
    token = traceparent.set(TRACE)
    yield
    traceparent.reset(token)


@pytest.mark.parametrize("channel", EVENTS)
def test_an_event_has_its_channel_and_its_payload(channel: str) -> None:
    payload, data = EVENTS[channel]
    event = cloud_event(payload)
    assert (event.type, event.source) == (channel, "/osiris/llm-sidecar")
    assert json.loads(event.data) == data
    name = type(payload).__name__
    assert event.dataschema == f"docs/asyncapi.yaml#/components/schemas/{name}"
    assert uuid.UUID(event.id) != uuid.UUID(cloud_event(payload).id)
    age = timestamps.now() - datetime.datetime.fromisoformat(event.time)
    assert abs(age) < datetime.timedelta(minutes=1)
    assert event.traceparent is None


def test_events_of_one_cause_have_the_same_id_if_they_are_of_one_type() -> None:
    cause, other = uuid.uuid4(), uuid.uuid4()
    created, assessed = (EVENTS[f"phi3.proposal.{name}"][0] for name in ("created", "assessed"))
    ids = [
        cloud_event(payload, of).id
        for payload, of in ((created, cause), (created, cause), (assessed, cause), (created, other))
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_every_payload_has_its_event() -> None:
    assert {channel: type(payload) for channel, (payload, _) in EVENTS.items()} == PAYLOADS


@pytest.mark.usefixtures("trace")
def test_an_event_belongs_to_the_trace_of_its_request() -> None:
    payload, _ = EVENTS["phi3.adapter.swapped"]
    assert cloud_event(payload).traceparent == TRACE


def test_the_name_of_a_key_is_in_the_event() -> None:
    _, data = EVENTS["phi3.feedback.submitted"]
    event = cloud_event(FeedbackSubmitted.model_validate(data | {"author": "desk"}))
    assert json.loads(event.data) == data | {"author": "desk"}


def test_a_sidecar_can_read_what_another_one_publishes() -> None:
    payload, _ = EVENTS["phi3.feedback.submitted"]
    received = RECEIVED["phi3.feedback.submitted"].model_validate_json(cloud_event(payload).data)
    assert isinstance(received, PublishedFeedback)
    assert (received.feedback_id, received.stored_in) == ("f-1", "d-1")


@pytest.mark.parametrize("field", ["score", "answer_mass"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_score_and_its_mass_are_shares(field: str, value: float) -> None:
    _, data = EVENTS["phi3.proposal.assessed"]
    with pytest.raises(ValidationError, match=field):
        ProposalAssessed.model_validate(data | {field: value})


@pytest.mark.parametrize("model", [*PAYLOADS.values(), *RECEIVED.values()])
def test_every_field_of_a_payload_is_described(model: type[BaseModel]) -> None:
    if model is not PublishedFeedback:
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.examples, name
    assert model.__doc__


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (TRACE, True),
        (TRACE.replace("00-0a", "01-0a"), False),
        (TRACE.upper(), False),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", False),
        (f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01", False),
        (f"{TRACE}-extra", False),
        ("", False),
    ],
)
def test_a_trace_context_is_checked(value: str, valid: bool) -> None:
    assert is_traceparent(value) is valid

"""The events of the sidecar: the payload of each, and the CloudEvent that carries it.

`docs/asyncapi.yaml` is generated from `PAYLOADS` and `RECEIVED`; docs/events.md describes each
event.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.db import PublishedFeedback
from llm_sidecar.event_bus import SOURCE
from llm_sidecar.proposals import Proposal
from llm_sidecar.telemetry.trace_context import traceparent

PROPOSAL_CREATED: Final = "phi3.proposal.created"
PROPOSAL_ASSESSED: Final = "phi3.proposal.assessed"
FEEDBACK_SUBMITTED: Final = "phi3.feedback.submitted"
ADAPTER_SWAPPED: Final = "phi3.adapter.swapped"

_SCHEMAS: Final = "docs/asyncapi.yaml#/components/schemas/"

_TRANSACTION_ID: Final = "17c223bb-3645-4fda-b3c6-b0090e90b109"
_MOMENT: Final = "2026-01-31T10:00:00.123456+00:00"

Moment = Annotated[
    datetime.datetime,
    PlainSerializer(datetime.datetime.isoformat, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""An aware time, which ISO 8601 writes with its offset from UTC."""


class Payload(BaseModel):
    """A payload that the sidecar makes."""

    model_config = ConfigDict(frozen=True)


class ProposalCreated(Proposal):
    """Phi-3 has written a proposal, which Hermes has not judged yet."""

    transaction_id: uuid.UUID = Field(
        description="identifies the run in rows, events and answers", examples=[_TRANSACTION_ID]
    )


class ProposalAssessed(Payload):
    """Hermes has criticised and scored a proposal."""

    proposal_transaction_id: uuid.UUID = Field(
        description="the `transaction_id` of the proposal", examples=[_TRANSACTION_ID]
    )
    assessment_text: str = Field(
        description="Hermes' critique", examples=["The tighter stop fits an overbought market."]
    )
    timestamp: Moment = Field(description="when the assessment was complete", examples=[_MOMENT])
    score: float = Field(
        ge=0, le=1, description="Hermes' score: 0 is worst, 1 is best", examples=[0.75]
    )
    answer_mass: float = Field(
        ge=0,
        le=1,
        description="the probability of the eleven answers 0 to 10 in total; a score is not "
        "reliable if it is small",
        examples=[0.98],
    )


class FeedbackSubmitted(Payload):
    """Feedback on a proposal is stored."""

    timestamp: datetime.datetime = Field(
        description="when the feedback was given", examples=["2026-01-31T10:00:00Z"]
    )
    feedback_id: str = Field(description="identifies the feedback", examples=["9f2c1d64a7d0"])
    transaction_id: str = Field(description="the run of the proposal", examples=[_TRANSACTION_ID])
    feedback_type: Literal["correction", "rating", "qualitative_comment", "human_edit"] = Field(
        description="what kind of feedback it is", examples=["rating"]
    )
    feedback_content: str | dict[str, Any] = Field(
        description="the feedback itself", examples=["The stop is too tight."]
    )
    schema_version: str = Field(
        description="the version of the feedback's format", examples=["1.0"]
    )
    corrected_proposal: dict[str, Any] | None = Field(
        description="the proposal as it should have been; null for none", examples=[None]
    )
    stored_in: str = Field(
        description="the id of the database that has the feedback", examples=["d41d8cd9"]
    )
    author: str | None = Field(
        None,
        description="the name of the API key that sent the feedback; absent without a named key",
        examples=["desk"],
    )


class AdapterSwapped(Payload):
    """Phi-3 uses another adapter from now on."""

    adapter: str | None = Field(
        description="the name of the adapter in use; null for none", examples=["20260131-dpo"]
    )
    previous: str | None = Field(
        description="the name of the adapter before it; null for none", examples=["20260124"]
    )
    timestamp: Moment = Field(description="when it was swapped", examples=[_MOMENT])


PAYLOADS: Final[Mapping[str, type[BaseModel]]] = {
    PROPOSAL_CREATED: ProposalCreated,
    PROPOSAL_ASSESSED: ProposalAssessed,
    FEEDBACK_SUBMITTED: FeedbackSubmitted,
    ADAPTER_SWAPPED: AdapterSwapped,
}
"""The payload of each event that the sidecar makes, by its channel."""
RECEIVED: Final[Mapping[str, type[BaseModel]]] = {FEEDBACK_SUBMITTED: PublishedFeedback}
"""The payload of each event that the sidecar takes from other services, by its channel."""
_CHANNELS: Final = {payload: channel for channel, payload in PAYLOADS.items()}


def cloud_event(payload: BaseModel, cause: uuid.UUID | None = None) -> CloudEvent:
    """The event with this payload; it carries the trace context of the current request.

    Args:
        payload: of a class in `PAYLOADS`.
        cause: the id of the attempt that makes the event. If a machine dies, and another one
            executes the attempt again, its event has the same id.
    """
    channel = _CHANNELS[type(payload)]
    return CloudEvent(
        type=channel,
        id=str(uuid.uuid4() if cause is None else uuid.uuid5(cause, channel)),
        # An absent key is not null: a proposal without a side has no `side`.
        data=payload.model_dump_json(exclude_unset=True),
        source=SOURCE,
        dataschema=f"{_SCHEMAS}{type(payload).__name__}",
        traceparent=traceparent.get(),
    )

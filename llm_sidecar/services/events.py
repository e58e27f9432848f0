"""The events that the sidecar publishes; docs/events.md describes each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llm_sidecar.event_bus import EventBus

PROPOSAL_CREATED: Final = "phi3.proposal.created"
PROPOSAL_ASSESSED: Final = "phi3.proposal.assessed"
FEEDBACK_SUBMITTED: Final = "phi3.feedback.submitted"


async def publish(bus: EventBus, channel: str, payload: Mapping[str, Any]) -> None:
    """Publishes a payload as JSON; the bus queues it while Redis is unavailable."""
    await bus.publish(channel, json.dumps(payload))


PAYLOADS: Final = dict.fromkeys((PROPOSAL_CREATED, PROPOSAL_ASSESSED, FEEDBACK_SUBMITTED))

"""An event as CloudEvents 1.0 describes it (https://github.com/cloudevents/spec)."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Final

from llm_sidecar import timestamps

SPEC_VERSION: Final = "1.0"
CONTENT_TYPE: Final = "application/json"


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """An event, and the data that subscribers of its channel receive.

    Attributes:
        type: the name of the event, which is also its channel.
        data: the payload as JSON text.
        source: the service that produced the event, as a URI reference.
        dataschema: a URI reference to the schema of the data.
        id: unique within a source. Receivers use it to recognise duplicates.
        time: when it happened, in RFC 3339 and UTC.
        traceparent: the W3C trace context of the request, or None.
    """

    type: str
    data: str
    source: str
    dataschema: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    time: str = field(default_factory=lambda: timestamps.now().isoformat())
    traceparent: str | None = None

    def fields(self) -> dict[str, str]:
        """The fields of the event's entry in a Redis stream."""
        fields = {
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "time": self.time,
            "specversion": SPEC_VERSION,
            "datacontenttype": CONTENT_TYPE,
            "dataschema": self.dataschema,
            "data": self.data,
        }
        return fields if self.traceparent is None else fields | {"traceparent": self.traceparent}

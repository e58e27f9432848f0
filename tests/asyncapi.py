"""Generates `docs/asyncapi.yaml`, which describes the channels and streams in Redis.

    .venv/bin/python -m tests.docs_tables

writes it, and `tests/integration/test_asyncapi.py` fails while it differs from the code. It is an
AsyncAPI 3.0 document (https://www.asyncapi.com/docs/reference/specification/v3.0.0).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llm_sidecar import __version__
from llm_sidecar.cloud_event import CONTENT_TYPE, SPEC_VERSION
from llm_sidecar.event_bus.dead_letters import DEAD, INBOX
from llm_sidecar.services.events import PAYLOADS, RECEIVED, cloud_event
from llm_sidecar.settings import Settings
from llm_sidecar.tts.voice import AUDIO_BYTES
from osiris.schemas.feedback import FeedbackRequest

_HEADER: Final = "# Generated from the code by `.venv/bin/python -m tests.docs_tables`.\n"
_DESCRIPTION: Final = (
    "Proposals, critiques and feedback, as the sidecar and other services exchange them in Redis. "
    "A pub/sub channel keeps nothing: a client that is not connected misses its messages. A stream "
    "keeps its entries. Every event but `audio.bytes` is a message of its channel and an entry of "
    "the stream of events, whose fields are the attributes of CloudEvents 1.0 and `data`, the "
    "payload as JSON text."
)
_ENTRY_ID: Final = "6f1c2a9e-5b0d-4a38-9d55-0c8f3e0b7f11"
_MOMENT: Final = "2026-01-31T10:00:00.123456+00:00"
_FEEDBACK: Final = {
    "transaction_id": "17c223bb-3645-4fda-b3c6-b0090e90b109",
    "feedback_type": "correction",
    "feedback_content": "The stop is too tight.",
    "timestamp": "2026-01-31T10:00:00Z",
    "schema_version": "1.0",
}
"""Feedback of another service: the least that is useful."""
_INBOX_ENTRY: Final = {
    "id": "desk-20260131-17",
    "type": next(iter(RECEIVED)),
    "data": json.dumps(_FEEDBACK),
}

_FEEDBACK_FIELDS: Final = {
    **{name: field.description for name, field in FeedbackRequest.model_fields.items()},
    "feedback_id": "feedback with the same id is stored once; default: a hash of the feedback",
    "stored_in": "leave it out: a sidecar sets it on feedback that it has stored",
    "author": "leave it out: only the sidecar knows who sent feedback over HTTP",
}
"""The fields of feedback, over HTTP as on the bus."""

Schema = dict[str, Any]


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


CLOUD_EVENT: Final[Schema] = {
    "type": "object",
    "description": "The attributes of an event, as CloudEvents 1.0 has them. Every value is text.",
    "properties": {
        "id": _text("unique within a source: a duplicate has the same id"),
        "source": _text("the service that produced the event", format="uri-reference"),
        "type": _text("the type of the event, which is also its channel"),
        "time": _text("when it happened", format="date-time"),
        "specversion": _text("the version of CloudEvents", const=SPEC_VERSION),
        "datacontenttype": _text("the format of `data`", const=CONTENT_TYPE),
        "dataschema": _text("where the schema of `data` is", format="uri-reference"),
        "data": _text("the payload as JSON text", contentMediaType=CONTENT_TYPE),
        "traceparent": _text("the W3C trace context of the request, if it was traced"),
    },
    "required": [
        *("id", "source", "type", "time", "specversion", "datacontenttype", "dataschema", "data"),
    ],
}
INBOX_ENTRY: Final[Schema] = {
    "type": "object",
    "description": "An event of another service. Further attributes of CloudEvents are ignored.",
    "properties": {
        "id": _text("feedback is stored once for each id", minLength=1),
        "type": _text("the type of the event", enum=[*RECEIVED]),
        "data": _text("the payload as JSON text", contentMediaType=CONTENT_TYPE),
    },
    "required": ["id", "type", "data"],
}
DEAD_LETTER: Final[Schema] = {
    "type": "object",
    "description": "An entry of the inbox that no sidecar could store. Every value is text.",
    "properties": {
        "time": _text("when the entry became a dead letter", format="date-time"),
        "reason": _text("why, without any text of the entry"),
        "entry": _text("the id that the entry had in the inbox", pattern="^[0-9]+-[0-9]+$"),
        "deliveries": _text("how often a sidecar received it", pattern="^[0-9]+$"),
        "fields": _text("the fields of the entry, as JSON text", contentMediaType=CONTENT_TYPE),
    },
    "required": ["time", "reason", "entry", "deliveries", "fields"],
}


def text() -> str:
    """The document as YAML."""
    written: str = yaml.safe_dump(document(), sort_keys=False, width=100, allow_unicode=True)
    return _HEADER + written


def document() -> dict[str, Any]:
    """The document as JSON types."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Osiris LLM sidecar",
            "version": __version__,
            "description": _DESCRIPTION,
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "redis": {
                "host": "localhost:6379",
                "pathname": "/0",
                "protocol": "redis",
                "description": "The Redis that `REDIS_URL` names.",
            }
        },
        "channels": _channels(),
        "operations": dict(_operations()),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channels() -> dict[str, Any]:
    stream = Settings.from_environ({}).events.stream
    channels = {
        _id(channel): _channel(
            channel, "A pub/sub channel.", model.__name__, *_names(RECEIVED, channel)
        )
        for channel, model in PAYLOADS.items()
    }
    return channels | {
        _id(AUDIO_BYTES): _channel(AUDIO_BYTES, "A pub/sub channel.", "AudioBytes"),
        "events": _channel(
            stream,
            "A stream; `EVENT_STREAM` is its name. It keeps about `EVENT_STREAM_MAXLEN` entries.",
            *(f"{model.__name__}Entry" for model in PAYLOADS.values()),
        ),
        "inbox": _channel(
            INBOX,
            "A stream to which other services add feedback for the sidecars to store.",
            "InboxEntry",
        ),
        "deadLetters": _channel(
            DEAD, "A stream with the entries of the inbox that could not be stored.", "DeadLetter"
        ),
    }


def _id(channel: str) -> str:
    """The key of a channel, which has no dots."""
    return channel.replace(".", "-")


def _names(models: Mapping[str, type[BaseModel]], channel: str) -> Iterator[str]:
    if channel in models:
        yield models[channel].__name__


def _channel(address: str, description: str, *messages: str) -> dict[str, Any]:
    return {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
    }


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    """The operations of the sidecar."""
    for channel, model in PAYLOADS.items():
        yield f"publish{model.__name__}", _operation("send", _id(channel), model.__name__)
    yield "publishAudioBytes", _operation("send", _id(AUDIO_BYTES), "AudioBytes")
    for channel, model in RECEIVED.items():
        yield f"receive{model.__name__}", _operation("receive", _id(channel), model.__name__)
    entries = [f"{model.__name__}Entry" for model in PAYLOADS.values()]
    yield "addEvent", _operation("send", "events", *entries)
    yield "readInbox", _operation("receive", "inbox", "InboxEntry")
    yield "addDeadLetter", _operation("send", "deadLetters", "DeadLetter")


def _operation(action: str, channel: str, *messages: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in messages],
    }


def _messages() -> dict[str, Any]:
    messages: dict[str, Any] = {}
    for channel, model in PAYLOADS.items():
        name, example = model.__name__, _example(model)
        messages[name] = _message(channel, _summary(model), _ref(name), example)
        messages[f"{name}Entry"] = _entry_message(channel, model, example)
    for channel, model in RECEIVED.items():
        name = model.__name__
        messages[name] = _message(channel, _summary(model), _ref(name), _FEEDBACK)
    wav = _text("one WAV file", contentEncoding="base64", contentMediaType="audio/wav")
    summary = "A part of a text has been spoken. This is not in the stream."
    messages["AudioBytes"] = _message(AUDIO_BYTES, summary, wav, "UklGRiQAAABXQVZFZm10IA==") | {
        "contentType": "text/plain"
    }
    messages["InboxEntry"] = _message(
        "inbox entry", "An event of another service.", _ref("InboxEntry"), _INBOX_ENTRY
    )
    messages["DeadLetter"] = _message(
        "dead letter",
        "An entry of the inbox that no sidecar could store.",
        _ref("DeadLetter"),
        {
            "time": _MOMENT,
            "reason": "transaction_id: Field required",
            "entry": "1769853500456-0",
            "deliveries": "1",
            "fields": json.dumps(_INBOX_ENTRY),
        },
    )
    return messages


def _message(name: str, summary: str, payload: Schema, example: Any) -> dict[str, Any]:
    return {
        "name": name,
        "summary": summary,
        "payload": payload,
        "examples": [{"payload": example}],
    }


def _entry_message(channel: str, model: type[BaseModel], example: Schema) -> dict[str, Any]:
    """The message that is the entry of an event in the stream."""
    event = dataclasses.replace(
        cloud_event(model.model_validate_json(json.dumps(example))),
        id=_ENTRY_ID,
        time=_MOMENT,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    own = {
        "properties": {
            "type": {"const": channel},
            "dataschema": {"const": event.dataschema},
            "data": {"description": f"a payload `{model.__name__}` as JSON text"},
        }
    }
    payload = {"allOf": [_ref("CloudEvent"), own]}
    return _message(f"entry of {channel}", _summary(model), payload, event.fields())


def _example(model: type[BaseModel]) -> dict[str, Any]:
    """A payload of the first examples of the fields."""
    return {name: of["examples"][0] for name, of in model.model_json_schema()["properties"].items()}


def _schemas() -> dict[str, Schema]:
    models = dict.fromkeys((*PAYLOADS.values(), *RECEIVED.values()))
    _, made = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Schema] = made["$defs"]
    for model in models:
        schemas[model.__name__]["description"] = _summary(model)
    for model in RECEIVED.values():
        for name, field in schemas[model.__name__]["properties"].items():
            field["description"] = _FEEDBACK_FIELDS[name]
    return schemas | {
        "CloudEvent": CLOUD_EVENT,
        "InboxEntry": INBOX_ENTRY,
        "DeadLetter": DEAD_LETTER,
    }


def _summary(model: type[BaseModel]) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((model.__doc__ or "").partition("\n\n")[0].split())


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}

"""The part of OpenAI's document that the sidecar supports, for schemathesis.

document = supported(json.loads(openai_document.COPY.read_text()))
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from tests.openai_document import used


def _refers(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_MODELS: Final = {"type": "string", "enum": ["hermes", "phi3"]}
_CLIENTS_SCHEMA: Final = {
    "const": {
        "type": "object",
        "properties": {"ticker": {"type": "string", "maxLength": 5}, "size": {"type": "integer"}},
        "required": ["ticker", "size"],
        "additionalProperties": False,
    }
}
"""Of tools and answers. OpenAI's document allows any object here."""
_NAME: Final = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_SEED: Final = {"type": ["integer", "null"], "maximum": 2**63 - 1, "minimum": -(2**63)}
"""The document rounds the limits to what a double-precision number holds."""
_TOKENS: Final = {"type": "integer", "minimum": 1, "maximum": 16}
"""A small number of tokens, so that a run takes seconds."""

_SCHEMAS: Final[Mapping[str, Any]] = {
    "ModelIdsShared": _MODELS,
    "ModelIdsResponses": _MODELS,
    "FunctionParameters": _CLIENTS_SCHEMA,
    "ChatCompletionToolChoiceOption": {"enum": ["none", "auto"]},
    "ToolChoiceParam": {"enum": ["none", "auto"]},
    "StopConfiguration": {"type": ["string", "null"], "minLength": 1, "maxLength": 256},
    "ResponseFormatJsonSchemaSchema": _CLIENTS_SCHEMA,
}
"""Schemas that are replaced."""

_UNSUPPORTED: Final[Mapping[str, str]] = {
    "ChatCompletionRequestMessage": "ChatCompletionRequestFunctionMessage",
    "ChatCompletionRequestUserMessageContentPart": (
        "ChatCompletionRequestMessageContentPartImage ChatCompletionRequestMessageContentPartAudio "
        "ChatCompletionRequestMessageContentPartFile"
    ),
    "ChatCompletionMessageToolCalls": "ChatCompletionMessageCustomToolCall",
}
"""The members of a union that a request may not have."""

_SUPPORTED: Final[Mapping[str, str]] = {
    "InputItem": "EasyInputMessage Item",
    "Item": "InputMessage OutputMessage FunctionToolCall FunctionCallOutputItemParam",
    "InputContent": "InputTextContent",
    "Tool": "FunctionTool",
}
"""The only members of a union that a request may have."""

_REFUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "CreateChatCompletionRequest": (
        *("audio", "frequency_penalty", "function_call", "functions", "logit_bias", "modalities"),
        *("moderation", "prediction", "presence_penalty", "web_search_options"),
    ),
    "ChatCompletionRequestAssistantMessage": ("audio", "function_call"),
    "CreateCompletionRequest": (
        *("best_of", "frequency_penalty", "logit_bias", "presence_penalty", "suffix"),
    ),
    "CreateResponse": (*("context_management", "conversation", "moderation", "truncation"),),
    "CreateSpeechRequest": ("instructions", "speed"),
    "ResponseProperties": ("background", "max_tool_calls", "previous_response_id", "prompt"),
}
"""Fields that a request may not have."""

_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "CreateModelResponseProperties": {"top_logprobs": {"const": 0}},
    "ModelResponseProperties": {"top_logprobs": {"const": 0}},
    "CreateChatCompletionRequest": {
        "seed": _SEED,
        "top_logprobs": {"const": 0},
        "tools": {"type": "array", "items": _refers("ChatCompletionTool"), "maxItems": 1},
        "max_tokens": _TOKENS,
        "max_completion_tokens": _TOKENS,
        "n": {"type": "integer", "minimum": 1, "maximum": 8},
    },
    "CreateCompletionRequest": {
        "model": _MODELS,
        "seed": _SEED,
        "prompt": {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        },
        "max_tokens": _TOKENS,
        "n": {"type": "integer", "minimum": 1, "maximum": 8},
    },
    "CreateResponse": {"max_output_tokens": {"type": "integer", "minimum": 16, "maximum": 32}},
    "CreateSpeechRequest": {
        "input": {"type": "string", "pattern": "^[a-z]{1,40}$"},
        "voice": {"type": "string", "minLength": 1},
        "model": {"type": "string", "minLength": 1},
        "response_format": {"type": "string", "enum": ["wav", "pcm"]},
    },
    "FunctionObject": {"name": _NAME},
    "FunctionTool": {"name": _NAME, "parameters": _CLIENTS_SCHEMA},
}
"""Fields with narrower values."""

_ERROR: Final = {
    "description": "",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {
                            "message": {"type": "string", "minLength": 1},
                            "type": {"type": "string", "minLength": 1},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                        "required": ["message", "type", "param", "code"],
                    }
                },
                "required": ["error"],
            }
        }
    },
}
"""The answer of an error, which OpenAI's document leaves out."""


def supported(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with requests that the sidecar serves, and with the form of errors."""
    narrowed = corrected(document)
    schemas = narrowed["components"]["schemas"]
    schemas |= _SCHEMAS
    for name, members in _UNSUPPORTED.items():
        _narrow(schemas[name], members.split(), keep=False)
    for name, members in _SUPPORTED.items():
        _narrow(schemas[name], members.split(), keep=True)
    for name, refused in _REFUSED.items():
        for properties in _properties(schemas[name]):
            for field in refused:
                properties.pop(field, None)
    for name, fields in _FIELDS.items():
        for properties in _properties(schemas[name]):
            properties |= {key: fields[key] for key in fields.keys() & properties.keys()}
    for operations in narrowed["paths"].values():
        for operation in operations.values():
            operation["responses"]["4XX"] = _ERROR
            content = operation["responses"]["200"]["content"]
            # The document describes events without their framing, and leaves out those of
            # completions.
            content["text/event-stream"] = {}
            if "application/octet-stream" in content:
                # It does not describe the audio.
                audio = content.pop("application/octet-stream")
                content |= {"audio/wav": audio, "audio/pcm": audio}
    narrowed["components"]["schemas"] = used(narrowed["paths"], schemas)
    return narrowed


def _narrow(union: dict[str, Any], names: Collection[str], *, keep: bool) -> None:
    """Keeps only the members with these names, or all others."""
    union = union.get("items", union)
    union["oneOf"] = [
        member
        for member in union["oneOf"]
        if (member.get("$ref", "").rpartition("/")[2] in names) == keep
    ]


def _properties(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The properties of a schema and of the parts that it consists of."""
    if "properties" in schema:
        yield schema["properties"]
    for part in schema.get("allOf", ()):
        yield from _properties(part)


def corrected(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with null where OpenAI's own answers have it."""
    document = copy.deepcopy(dict(document))
    schemas = document["components"]["schemas"]
    choice = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]
    logprobs = choice["properties"]["logprobs"]["anyOf"][0]["properties"]
    # The first token of an echo has no log probability, and a stream has no usage before its end.
    nullable = [
        *(logprobs[name]["items"] for name in ("token_logprobs", "top_logprobs")),
        *(each["usage"] for each in _properties(schemas["Response"]) if "usage" in each),
    ]
    for schema in nullable:
        schema["nullable"] = True
    made: dict[str, Any] = _with_null(document)
    return made


def _with_null(value: Any) -> Any:
    """A copy that allows null as in OpenAPI 3.1: the document mixes 3.1 and 3.0."""
    if isinstance(value, dict):
        own = {key: _with_null(each) for key, each in value.items() if key != "nullable"}
        return {"anyOf": [own, {"type": "null"}]} if value.get("nullable") is True else own
    if isinstance(value, list):
        return [_with_null(each) for each in value]
    return value

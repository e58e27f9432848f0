"""The formats in which servers take a schema, strictest first.

A server's own conversion of JSON schemas often allows free whitespace and any number of digits, so
that an answer may never end. A regular expression or a grammar bounds every answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Final

from llm_sidecar.engines.base import Message
from llm_sidecar.engines.gbnf import to_gbnf
from llm_sidecar.models.remote.regex import literal, schema_regex

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SchemaFormat:
    """How a request tells a server which schema the answer must follow.

    Attributes:
        name: in `/health`.
        fields: the fields of a request for a JSON schema text; raises ValueError if it cannot
            express the schema.
        probe: the fields of a request that `PROBE_TEXT` answers, and hardly any other text.
    """

    name: str
    fields: Callable[[str], Body]
    probe: Body


FREE_TEXT: Final[Body] = {"response_format": {"type": "text"}}
"""The fields of a request for free text; without them phi3 on another sidecar writes a proposal."""
_VALUES: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are not schemas."""
_NAMED: Final = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)
"""Keywords whose values map names to schemas."""
PROBE_TEXT: Final = '{"osiris":"yes"}'
_PROBE_SCHEMA: Final = {
    "type": "object",
    "properties": {"osiris": {"enum": ["yes"]}},
    "required": ["osiris"],
    "additionalProperties": False,
}


def _regex(expression: str) -> Body:
    """The fields of vLLM, and of SGLang."""
    return {"structured_outputs": {"regex": expression}, "regex": expression}


def _grammar(grammar: str) -> Body:
    """For llama.cpp."""
    return {"grammar": grammar}


def _json_schema(schema: Any) -> Body:
    # Without `strict`: OpenAI would refuse a schema with an optional property.
    answer = {"name": "answer", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": answer}}


def without(schema: Any, *keywords: str) -> Any:
    """A copy of a schema without some keywords, at any depth."""
    if isinstance(schema, list):
        return [without(item, *keywords) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in keywords:
            continue
        if key in _VALUES:
            copy[key] = value
        elif key in _NAMED and isinstance(value, dict):
            copy[key] = {name: without(one, *keywords) for name, one in value.items()}
        else:
            copy[key] = without(value, *keywords)
    return copy


def in_prompt(messages: list[Message], schema: str) -> list[Message]:
    """The chat with the schema in its system message, for a server that takes no schema."""
    text = json.dumps(without(json.loads(schema), "x-guidance", "pattern"), separators=(",", ":"))
    rule = f"Answer with one JSON object and nothing else. Its JSON schema: {text}"
    if messages and messages[0]["role"] == "system":
        first = {"role": "system", "content": f"{messages[0]['content']}\n\n{rule}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": rule}, *messages]


def forced(schema_formats: Container[str], text: str) -> Body | None:
    """The fields of a request for an answer that begins with this text; None if the server supports
    none.

    All tokens may follow: vLLM returns log probabilities among the tokens that guidance allows.
    """
    if "regex" in schema_formats:
        return _regex(rf"{literal(text)}(.|\n)*")
    if "grammar" in schema_formats:
        return _grammar(rf"root ::= {json.dumps(text)} [^\x00]*")
    return None


SCHEMA_FORMATS: Final = (
    SchemaFormat(
        "regex", lambda schema: _regex(schema_regex(schema)), _regex(r'\{"osiris":"yes"\}')
    ),
    SchemaFormat(
        "grammar",
        lambda schema: _grammar(to_gbnf(schema)),
        _grammar(r'root ::= "{\"osiris\":\"yes\"}"'),
    ),
    SchemaFormat(
        "json_schema",
        lambda schema: _json_schema(without(json.loads(schema), "x-guidance")),
        _json_schema(_PROBE_SCHEMA),
    ),
)


def forced_number(schema_formats: Container[str], text: str) -> Body | None:
    """The fields of a request for the number that these digits and a 0 make, for servers that take
    JSON schemas only; None if it cannot be expressed.

    No other token may follow. So use the log probabilities of the answer only if the server
    computes them before guidance.
    """
    if "json_schema" not in schema_formats or not text.isdecimal():
        return None
    return _json_schema({"const": int(f"{text}0")})


def guided(schema_formats: Container[str], schema: str) -> Body | None:
    """The fields of a request for an answer that follows a schema, in the strictest format that can
    express it; None if there is none, so that only the prompt can state the schema.

    Args:
        schema_formats: the names of the formats that the server supports.
        schema: JSON schema text.
    """
    for schema_format in SCHEMA_FORMATS:
        if schema_format.name in schema_formats:
            try:
                return schema_format.fields(schema)
            except ValueError:
                continue
    return None

"""Clients' schemas: refusals, guided answers, and the effect on other requests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from llm_sidecar import proposals
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import Batch, Delta
from llm_sidecar.engines.guidance import Grammars
from llm_sidecar.errors import InvalidRequest

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
HEAVY = {"type": "string", "pattern": "^(([a-z]{0,100}[0-9]{0,100}){0,100}x){0,100}$"}
"""Followed for a few tokens only."""


def asked(schema: Any, max_tokens: int = 60, **settings: Any) -> GenerationRequest:
    text = json.dumps(schema | COMPACT) if isinstance(schema, dict) else json.dumps(schema)
    return GenerationRequest([{"role": "user", "content": "Go."}], max_tokens, text, **settings)


@pytest.fixture(
    scope="module", params=["random_phi3_onnx", "serial_phi3_onnx", "random_phi3_torch"]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    return load_engine(request.getfixturevalue(request.param), device="cpu")


@pytest.fixture(scope="module")
def grammars(random_phi3_torch: Path) -> Grammars:
    return Grammars(Tokenizer.from_file(str(random_phi3_torch / "tokenizer.json")), [4])


def complete(engine: Engine, request: GenerationRequest) -> str:
    return "".join(delta.text for delta in engine.stream(request))


# Refused


SECRET = "SECRET"
REFUSED: Mapping[str, Any] = {
    "contains, uniqueItems is not supported; leave it out": {
        "type": "array",
        "uniqueItems": True,
        "contains": {},
    },
    "not is not supported; leave it out": {"not": {"type": "string"}},
    "if, then is not supported; leave it out": {"properties": {"a": {"if": {}, "then": {}}}},
    "propertyNames is not supported; leave it out": {"propertyNames": {"pattern": "^a"}},
    "dependentRequired is not supported; leave it out": {"dependentRequired": {SECRET: ["b"]}},
    "unevaluatedProperties is not supported; leave it out": {"unevaluatedProperties": False},
    "dependencies is not supported; leave it out": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "dependencies": {},
    },
    "this format is not supported": {"type": "string", "format": SECRET},
    "oneOf is not supported if its options may overlap; use anyOf": {
        "oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": {}}}]
    },
    "a pattern with look-around is not supported": {"type": "string", "pattern": f"^(?={SECRET})a"},
    "a pattern with back-references is not supported": {"type": "string", "pattern": r"(S)\1"},
    "patternProperties that may overlap are not supported": {
        "type": "object",
        "patternProperties": {f"^{SECRET}": {}, "^SE": {}},
    },
    "its pattern is not a regular expression": {"type": "string", "pattern": f"({SECRET}"},
    "its $ref has no target": {"$ref": f"#/$defs/{SECRET}"},
    "a $ref to another document is not supported": {"$ref": "file:///etc/passwd"},
    "this multipleOf is not supported": {"type": "integer", "multipleOf": 0},
    "its minimum or maximum is too large": {"type": "integer", "minimum": -(2**70)},
    "no value satisfies it": {"type": "string", "enum": [1]},
    "it is nested too deeply": json.loads('{"items":' * 200 + "{}" + "}" * 200),
    "it is too complex": {
        "type": "object",
        "properties": {f"p{number}": {"type": "string"} for number in range(1300)},
    },
    "it is not a valid JSON schema": {"type": SECRET},
    "its multipleOf is too large, or has too many digits": {"multipleOf": 123456789},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused_without_quoting_it(
    grammars: Grammars, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammars.check(json.dumps(REFUSED[reason] | COMPACT))
    assert caught.value.detail == f"schema: {reason}"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (False, "no value satisfies it"),
        ({"$ref": "#"}, "no value satisfies it"),
        ([], "it is not a valid JSON schema"),
        ({"type": "object", "x-guidance": {SECRET: 1}}, "it is not a valid JSON schema"),
        ({"type": "string", "pattern": ".*a.{30}b.*", "maxLength": 1000}, "it is too complex"),
    ],
)
def test_a_schema_without_values_or_meaning_is_refused(
    grammars: Grammars, schema: Any, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^schema: {reason}$"):
        grammars.check(json.dumps(schema))


def test_a_request_is_refused_before_it_waits(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"^schema: not is not supported"):
        engine.tokenize(asked({"not": {}}))


# Followed


FOLLOWED: Mapping[str, tuple[Any, str]] = {
    "bounded": ({"type": "string", "pattern": "^[a-c]{3}$"}, r'"[a-c]{3}"'),
    "number": ({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}, r"[01](\.\d+)?"),
    "long": (
        {"const": "as long as it takes " * 16},
        re.escape(json.dumps("as long as it takes " * 16)),
    ),
    "draft": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "T",
            "type": "object",
            "properties": {"k": {"enum": ["é", 1, None]}},
            "required": ["k"],
            "additionalProperties": False,
        },
        r'\{"k":("é"|1|null)\}',
    ),
    "union": (
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}},
                    "required": ["kind"],
                    "additionalProperties": False,
                }
                for kind in ("a", "b")
            ],
            "discriminator": {"propertyName": "kind"},
        },
        r'\{"kind":"[ab]"\}',
    ),
    "maxItems": (
        {"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 10**9},
        r"\[7,7.*",
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_schema_is_followed(engine: Engine, name: str, logprobs: int | None) -> None:
    schema, expected = FOLLOWED[name]
    request = asked(schema, 400, temperature=1.0, seed=5, logprobs=logprobs)
    assert re.fullmatch(expected, complete(engine, request), re.DOTALL)


def test_forced_tokens_come_no_faster_than_a_prefill(engine: Engine) -> None:
    request = asked({"const": "as long as it takes " * 16}, 400)
    counts = [delta.completion_tokens for delta in engine.stream(request)]
    assert counts[-1] > 300
    assert max(np.diff([0, *counts])) == 257


# Beside others


def texts(batch: Batch) -> dict[int, str | Exception]:
    """The result of each request of a batch."""
    found: dict[int, str | Exception] = {}
    while batch:
        for number, delta in batch.step():
            if isinstance(delta, Delta):
                found[number] = str(found.get(number, "")) + delta.text
            else:
                found[number] = delta
    return found


@pytest.mark.parametrize("folder", ["random_phi3_onnx", "random_phi3_torch"])
def test_a_row_that_cannot_follow_its_schema_fails_alone(
    folder: str, request: pytest.FixtureRequest
) -> None:
    engine = load_engine(request.getfixturevalue(folder), device="cpu")
    free = GenerationRequest([{"role": "user", "content": "Hello."}], 30)
    proposal = GenerationRequest(
        proposals.build_messages("Long ABC."), proposals.MAX_COMPLETION_TOKENS, proposals.GUIDANCE
    )
    heavy = asked(HEAVY, 200, temperature=1.5, seed=2)
    expected = [complete(engine, one) for one in (free, proposal)]
    batch = engine.batch()
    for number, one in enumerate((free, heavy, proposal)):
        batch.add(number, one)
    found = texts(batch)
    assert [found[0], found[2]] == expected
    error = found[1]
    assert isinstance(error, InvalidRequest)
    assert error.detail == "schema: the answer cannot follow it to its end; simplify it"
    with pytest.raises(InvalidRequest, match="cannot follow it"):
        complete(engine, heavy)
    # The engine goes on.
    assert complete(engine, free) == expected[0]


def test_a_completion_has_ten_seconds_of_processor_time_for_its_schema(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = grammars.matcher(json.dumps({"type": "string"}))
    clock = iter([0.0, 4.0, 4.0, 10.0, 10.0, 10.1])
    monkeypatch.setattr("time.thread_time", lambda: next(clock))
    (quote, *_) = matcher.allowed(512)
    matcher.consume(int(quote))
    with pytest.raises(InvalidRequest, match=r"^schema: the answer cannot follow it to its end"):
        matcher.allowed(512)


def test_many_schemas_of_clients_do_not_push_each_other_out_before_they_start(
    grammars: Grammars,
) -> None:
    schemas = [json.dumps({"const": number} | COMPACT) for number in range(16)]
    for schema in schemas:
        grammars.check(schema)
    hits = grammars._compiled.cache_info().hits
    for schema in schemas:
        grammars.matcher(schema)
    assert grammars._compiled.cache_info().hits - hits == 16

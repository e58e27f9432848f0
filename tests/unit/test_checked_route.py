"""Requests that are refused before their route runs."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llm_sidecar.errors import InvalidRequest
from tests.unit.fakes import FakeSidecar

BODY = b'{"prompt": "Long ABC from 100."}'
JSON = {"Content-Type": "application/json"}
CONTENT_TYPE = (
    "Content-Type: send the body as JSON, with the header Content-Type: application/json."
)
CHARSET = "Content-Type: JSON is UTF-8; send charset=utf-8, or leave the charset out."
ENCODING = (
    "Content-Encoding: the server does not decompress; send the body as it is, without this header."
)


def entries(response: httpx.Response) -> list[tuple[list[str], str]]:
    """(location, message) of each entry of a 422."""
    assert response.status_code == 422, response.text
    return [(entry["loc"], entry["msg"]) for entry in response.json()["detail"]]


# How a body is encoded


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ({}, CONTENT_TYPE),
        ({"Content-Type": ""}, CONTENT_TYPE),
        ({"Content-Type": "text/plain"}, CONTENT_TYPE),
        ({"Content-Type": "application/x-www-form-urlencoded"}, CONTENT_TYPE),
        ({"Content-Type": "application/json, text/plain"}, CONTENT_TYPE),
        ({"Content-Type": "text/json"}, CONTENT_TYPE),
        ({"Content-Type": "application/json; charset=latin-1"}, CHARSET),
        ({"Content-Type": "application/json; charset=utf-16"}, CHARSET),
        ({"Content-Type": "application/json" + ';"' * 125}, CONTENT_TYPE),
        (JSON | {"Content-Encoding": "gzip"}, ENCODING),
        (JSON | {"Content-Encoding": "identity, br"}, ENCODING),
    ],
)
async def test_a_body_that_is_not_declared_as_json_is_415(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, headers: dict[str, str], detail: str
) -> None:
    response = await asking.post("/generate/hermes/", content=BODY, headers=headers)
    assert response.status_code == 415
    assert response.json() == {"detail": detail}
    assert fake_sidecar.hermes.requests == []


async def test_two_content_types_are_415(asking: httpx.AsyncClient) -> None:
    headers = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
    response = await asking.post("/generate/hermes/", content=BODY, headers=headers)
    assert response.json() == {"detail": CONTENT_TYPE}


@pytest.mark.parametrize(
    "headers",
    [
        JSON,
        {"Content-Type": "APPLICATION/JSON"},
        {"Content-Type": 'application/json; charset="UTF-8"'},
        {"Content-Type": "application/vnd.desk+json;charset=utf-8;v=1"},
        JSON | {"Content-Encoding": "identity"},
    ],
)
async def test_a_body_that_is_declared_as_json_is_read(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, headers: dict[str, str]
) -> None:
    fake_sidecar.hermes.answers = [InvalidRequest("It was read.")]
    response = await asking.post("/generate/hermes/", content=BODY, headers=headers)
    assert response.json() == {"detail": "It was read."}


@pytest.mark.parametrize("body", [b"null", b'""', b'"x"', b"[]", b"[{}]", b"7", b"true"])
@pytest.mark.parametrize("path", ["/adapters/swap", "/generate/", "/speak"])
async def test_a_body_that_is_not_an_object_is_422(
    asking: httpx.AsyncClient, path: str, body: bytes
) -> None:
    response = await asking.post(path, content=body, headers=JSON)
    assert entries(response) == [(["body"], "Input should be an object")]


@pytest.mark.parametrize(("body", "at"), [(b"  ", 2), (b"{", 1), (b'{"adapter": }', 12)])
async def test_a_body_that_is_not_json_is_422_with_the_position(
    asking: httpx.AsyncClient, body: bytes, at: int
) -> None:
    response = await asking.post("/adapters/swap", content=body, headers=JSON)
    assert entries(response) == [(["body", at], "JSON decode error")]


# The newest adapter


async def nothing() -> AsyncIterator[bytes]:
    yield b""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, None),
        ({"headers": {"Content-Type": "text/plain"}}, None),
        ({"content": nothing()}, None),
        ({"json": {}}, None),
        ({"json": {"adapter": None}}, None),
        ({"json": {"adapter": "20260102-dpo"}}, "20260102-dpo"),
    ],
)
async def test_the_newest_adapter_is_the_default(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    named: str | None,
) -> None:
    asked = []

    async def swap(name: str | None) -> datetime.date:
        asked.append(name)
        return datetime.date(2026, 1, 2)

    monkeypatch.setattr(fake_sidecar.sidecar.adapters, "swap", swap)
    response = await asking.post("/adapters/swap", **options)
    assert response.json() == {"status": "ok", "phi3_adapter_date": "2026-01-02"}
    assert asked == [named]


# Values of another type

INTEGER = "Input should be a valid integer"
NUMBER = "Input should be a valid number"
MODEL = "Input should be 'hermes' or 'phi3'"


@pytest.mark.parametrize(
    ("path", "field", "value", "message"),
    [
        ("/generate/", "max_length", "12", INTEGER),
        ("/generate/", "max_length", 12.0, INTEGER),
        ("/generate/", "max_length", True, INTEGER),
        ("/generate/", "max_length", None, INTEGER),
        ("/generate/phi3/", "max_length", [12], INTEGER),
        ("/generate/", "model_id", ["phi3"], MODEL),
        ("/generate/", "model_id", True, MODEL),
        ("/generate/", "prompt", 7, "Input should be a valid string"),
        ("/speak", "exaggeration", True, NUMBER),
        ("/speak", "exaggeration", "1", NUMBER),
        ("/adapters/swap", "adapter", 20260102, "Input should be a valid string"),
    ],
)
async def test_a_value_of_the_wrong_type_is_422_with_one_entry(
    asking: httpx.AsyncClient, path: str, field: str, value: object, message: str
) -> None:
    body = {"/speak": {"text": "Filled."}, "/adapters/swap": {}}.get(path, {"prompt": "Long ABC."})
    response = await asking.post(path, json=body | {field: value})
    assert entries(response) == [(["body", field], message)]


DIGITS = "Input should be an integer in decimal digits"


@pytest.mark.parametrize("limit", ["1e3", "5.0", "+5", "1_0", " 5", "true", ""])
async def test_an_integer_in_a_query_is_decimal_digits(
    asking: httpx.AsyncClient, limit: str
) -> None:
    response = await asking.get("/examples/", params={"limit": limit})
    assert entries(response) == [(["query", "limit"], DIGITS)]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_parameter_that_is_sent_twice_is_422(
    asking: httpx.AsyncClient, method: str
) -> None:
    response = await asking.request(method, "/examples/?limit=5&limit=5")
    assert response.status_code == 422
    response = await asking.post("/generate/?model_id=phi3&model_id=phi3", json={"prompt": "Long."})
    assert entries(response) == [(["query", "model_id"], "Parameter should be sent once")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_a_body_in_another_encoding_is_422(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, encoding: str
) -> None:
    body = BODY.decode().encode(encoding)
    response = await asking.post("/generate/hermes/", content=body, headers=JSON)
    assert response.status_code == 422
    assert response.json() == {"detail": "The body is not JSON in UTF-8."}
    assert fake_sidecar.hermes.requests == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "Input should have fewer levels"),
        (b"9" * 5_000, "Input should have shorter numbers"),
    ],
    ids=["depth", "digits"],
)
async def test_json_that_python_refuses_is_422_with_the_reason(
    asking: httpx.AsyncClient, value: bytes, message: str
) -> None:
    body = b'{"prompt": ' + value + b"}"
    response = await asking.post("/generate/hermes/", content=body, headers=JSON)
    assert entries(response) == [(["body"], message)]


async def test_several_unknown_fields_are_one_entry(asking: httpx.AsyncClient) -> None:
    response = await asking.post("/generate/phi3/", json={"prompt": "Long.", "a": 1, "b": 2})
    known = "Unknown field; the known ones are prompt, max_length"
    assert entries(response) == [(["body", "*"], known)]


@pytest.mark.parametrize(
    ("context", "fields"),
    [(None, "proposal: it"), ("ABC is quiet.", "proposal: with the context it")],
)
async def test_a_score_that_exceeds_the_context_names_the_fields(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, context: str | None, fields: str
) -> None:
    fake_sidecar.hermes.answers = [
        InvalidRequest("it takes 9000 tokens; shorten it", field="prompt")
    ]
    body = {"proposal": {"ticker": "ABC"}, "context": context}
    response = await asking.post("/score/hermes/", json=body)
    assert response.status_code == 422
    assert response.json() == {"detail": f"{fields} takes 9000 tokens; shorten it"}

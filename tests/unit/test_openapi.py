"""The OpenAPI document: everything in it is described, and true of the app."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from llm_sidecar import __version__
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.telemetry.metrics import NoMetrics
from osiris.schemas import Health
from osiris.server import create_app
from tests.unit.asgi import client

ENVIRON = {"REDIS_URL": "memory://", "ENABLE_METRICS": "true"}
OPERATIONS = {
    ("GET", "/health"): "health",
    ("GET", "/health/live"): "health_live",
    ("GET", "/health/ready"): "health_ready",
    ("POST", "/generate/"): "generate",
    ("POST", "/generate/hermes/"): "generate_hermes",
    ("POST", "/generate/phi3/"): "generate_phi3",
    ("POST", "/propose_trade_adjustments/"): "propose_trade_adjustments",
    ("POST", "/score/hermes/"): "score_hermes",
    ("POST", "/feedback/phi3/"): "submit_feedback",
    ("DELETE", "/feedback/{feedback_id}"): "withdraw_feedback",
    ("GET", "/examples/"): "list_examples",
    ("POST", "/speak"): "speak",
    ("GET", "/stream/audio"): "stream_audio",
    ("POST", "/adapters/swap"): "swap_adapters",
    ("GET", "/debug/prof"): "profile",
    ("GET", "/metrics"): "scrape_metrics",
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    made: dict[str, Any] = create_app(Settings.from_environ(ENVIRON)).openapi()
    return made


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def content_of(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The content of every response, by operation id and status."""
    return {
        (operation["operationId"], status): response.get("content", {})
        for _, _, operation in operations(document)
        for status, response in operation["responses"].items()
    }


def test_it_is_an_openapi_document(document: dict[str, Any]) -> None:
    validate(document)
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__
    assert {"title", "summary", "description"} <= set(document["info"])


def test_each_operation_has_its_functions_name(document: dict[str, Any]) -> None:
    ids = {(method, path): of["operationId"] for method, path, of in operations(document)}
    assert ids == OPERATIONS


def undescribed(document: dict[str, Any]) -> Iterator[str]:
    described_tags = {tag["name"] for tag in document["tags"] if tag.get("description")}
    for method, path, operation in operations(document):
        at = f"{method} {path}"
        if not (operation.get("summary") and operation.get("description")):
            yield at
        if not set(operation["tags"]) <= described_tags:
            yield f"{at} tag"
        for parameter in operation.get("parameters", ()):
            if not parameter.get("description"):
                yield f"{at} {parameter['name']}"
            if not parameter["schema"].get("examples"):
                yield f"{at} {parameter['name']} example"
        for status, response in operation["responses"].items():
            if response.get("description", "Successful Response") == "Successful Response":
                yield f"{at} {status}"
    for name, header in document["components"]["headers"].items():
        if not header.get("description") or "example" not in header:
            yield name
    for name, schema in document["components"]["schemas"].items():
        if not schema.get("description"):
            yield name
        for key, field in schema.get("properties", {}).items():
            if not field.get("description"):
                yield f"{name}.{key}"
            if not field.get("examples"):
                yield f"{name}.{key} example"


def test_everything_is_described(document: dict[str, Any]) -> None:
    assert list(undescribed(document)) == []


def test_every_choice_is_explained(document: dict[str, Any]) -> None:
    unexplained = [
        f"{name}.{key}: {choice}"
        for name, schema in document["components"]["schemas"].items()
        for key, field in schema.get("properties", {}).items()
        for choice in choices(field)
        if f"`{choice}`" not in field["description"] and name != "HealthSummary"
    ]
    assert unexplained == []


def choices(field: dict[str, Any]) -> list[str]:
    """The values that a field is limited to."""
    if "const" in field:
        return [field["const"]]
    found: list[str] = field.get("enum", [])
    return found + [choice for option in field.get("anyOf", ()) for choice in choices(option)]


def test_every_example_is_valid(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    bad = []
    for name, schema in schemas.items():
        cases = [(name, {"$ref": f"#/components/schemas/{name}"}, schema)]
        cases += [(f"{name}.{key}", of, of) for key, of in schema.get("properties", {}).items()]
        for at, checked, of in cases:
            validator = OAS31Validator({**checked, "components": document["components"]})
            bad += [at for example in of.get("examples", ()) if not validator.is_valid(example)]
    assert bad == []


def test_errors_have_the_body_that_they_are_answered_with(document: dict[str, Any]) -> None:
    content = content_of(document)
    bodies = {
        key: media["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for key, media in content.items()
        if key[1] >= "400"
    }
    propose = "propose_trade_adjustments"
    special = {
        (propose, "422"): "ProposalBadInput",
        **{(propose, status): "ProposalErrorBody" for status in ("429", "503", "504")},
        ("health_ready", "503"): "Probe",
    }
    for key, body in bodies.items():
        assert body == special.get(key, "BadInput" if key[1] == "422" else "ErrorBody"), key
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_answers_that_are_no_json_have_their_own_media_type(document: dict[str, Any]) -> None:
    content = content_of(document)
    others = {
        name: list(media)
        for (name, status), media in content.items()
        if status == "200" and "application/json" not in media
    }
    assert others == {
        "speak": ["audio/wav"],
        "stream_audio": ["text/event-stream"],
        "profile": ["text/html"],
        "scrape_metrics": ["text/plain; version=0.0.4; charset=utf-8"],
    }
    stream = content[("stream_audio", "200")]["text/event-stream"]["schema"]
    assert stream["contentSchema"] == {"$ref": "#/components/schemas/AudioEvent"}


def test_answers_declare_their_headers(document: dict[str, Any]) -> None:
    declared = {
        (operation["operationId"], status): set(response["headers"])
        for _, _, operation in operations(document)
        for status, response in operation["responses"].items()
    }
    everywhere = {"X-Request-ID", "traceresponse"}
    assert all(everywhere <= headers for headers in declared.values())
    for (name, status), headers in declared.items():
        retry = status in ("429", "503", "504") and name != "health_ready"
        assert ("Retry-After" in headers) == retry, (name, status)
        assert ("WWW-Authenticate" in headers) == (status == "401"), (name, status)
    generation = {"X-Model", "X-Finish-Reason", "X-Prompt-Tokens", "X-Completion-Tokens"}
    own = {
        name: headers - everywhere
        for (name, status), headers in declared.items()
        if status == "200"
    }
    assert {name: headers for name, headers in own.items() if headers} == {
        "generate": generation | {"X-Grounded"},
        "generate_hermes": generation,
        "generate_phi3": generation | {"X-Grounded"},
        "propose_trade_adjustments": generation | {"X-Grounded", "X-Hermes-Score", "X-Stored"},
        "score_hermes": {"X-Stored"},
        "submit_feedback": {"X-Feedback-ID"},
        "speak": {"X-Voice", "X-Voice-Reference"},
    }


def test_health_has_the_documented_keys_before_anything_is_there() -> None:
    """tests/test_documentation.py compares that of a server that answers."""
    health = Sidecar(Settings.from_environ(ENVIRON), NoMetrics()).health()
    assert Health.model_validate(health, strict=True).model_dump(mode="json") == health


async def test_the_served_document_names_the_server_under_its_root_path() -> None:
    app = create_app(Settings.from_environ(ENVIRON))
    for root_path, url in (("", "/"), ("/desk", "/desk")):
        async with client(app, root_path) as asking:
            for slash in ("", "/"):
                served = (await asking.get(f"{root_path}/openapi.json{slash}")).json()
                assert served.pop("servers") == [{"url": url, "description": "This server"}]
                assert served == app.openapi()

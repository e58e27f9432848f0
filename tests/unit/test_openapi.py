"""The OpenAPI document: it describes everything, and the app does what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from llm_sidecar import __version__
from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded, InvalidRequest, QueueFull
from llm_sidecar.models.base import Completion
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from osiris import docs_page
from osiris.idempotency import REPLAYED
from osiris.openapi import documented_paths
from osiris.schemas.health import Health
from osiris.server import create_app
from tests.unit.asgi import client
from tests.unit.fakes import FakeSidecar, completion

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
    ("GET", "/events/"): "stream_events",
    ("GET", "/events/dead"): "list_dead_letters",
    ("POST", "/events/dead/{id}/requeue"): "requeue_dead_letter",
    ("POST", "/speak"): "speak",
    ("GET", "/stream/audio"): "stream_audio",
    ("POST", "/adapters/swap"): "swap_adapters",
    ("GET", "/debug/prof"): "profile",
    ("GET", "/metrics"): "scrape_metrics",
    ("GET", "/v1/models"): "list_models",
    ("GET", "/v1/models/{model}"): "get_model",
    ("POST", "/v1/chat/completions"): "create_chat_completion",
    ("POST", "/v1/completions"): "create_completion",
    ("POST", "/v1/decisions"): "decide",
    ("POST", "/v1/responses"): "create_response",
    ("POST", "/v1/audio/speech"): "create_speech",
}
OPENAI = {name for (_, path), name in OPERATIONS.items() if path.startswith("/v1/")}
"""The operations whose errors are error objects, and whose bad input is 400."""


@pytest.fixture(scope="module")
def app(app_of: Callable[..., FastAPI]) -> FastAPI:
    return app_of(**ENVIRON)


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    made: dict[str, Any] = app.openapi()
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


def test_the_paths_of_the_routes_are_those_of_the_document(
    app: FastAPI, document: dict[str, Any]
) -> None:
    paths = [*document["paths"], *docs_page.PATHS]
    assert documented_paths(app) == {path.rstrip("/"): path for path in paths}


async def test_no_other_request_waits_for_the_document() -> None:
    app = create_app(Settings.from_environ(ENVIRON))
    app.state.sidecar = FakeSidecar().sidecar
    async with client(app) as asking:
        assert (await asking.get("/examples/")).status_code == 200
    assert app.openapi_schema is None


def test_each_operation_id_is_the_name_of_its_function(document: dict[str, Any]) -> None:
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
            # An example of a key would be sent with every request.
            if parameter["in"] != "header" and not parameter["schema"].get("examples"):
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


def test_errors_are_documented_with_their_bodies(document: dict[str, Any]) -> None:
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
        expected = "BadInput" if key[1] == "422" else "ErrorBody"
        if key[0] in OPENAI:
            assert key[1] != "422"
            expected = "OpenAIError"
        assert body == special.get(key, expected), key
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_an_optional_body_is_never_null(document: dict[str, Any]) -> None:
    bodies = {
        operation["operationId"]: operation["requestBody"]
        for _, _, operation in operations(document)
        if "requestBody" in operation
    }
    schemas = {name: of["content"]["application/json"]["schema"] for name, of in bodies.items()}
    assert all(set(schema) == {"$ref"} for schema in schemas.values())
    assert [name for name, of in bodies.items() if not of.get("required")] == ["swap_adapters"]


def test_answers_other_than_json_have_their_media_type(document: dict[str, Any]) -> None:
    content = content_of(document)
    others = {
        name: list(media)
        for (name, status), media in content.items()
        if status == "200" and "application/json" not in media
    }
    assert others == {
        "speak": ["audio/wav"],
        "create_speech": ["audio/wav", "audio/pcm", "text/event-stream"],
        "stream_audio": ["text/event-stream"],
        "stream_events": ["text/event-stream"],
        "profile": ["text/html"],
        "scrape_metrics": ["text/plain; version=0.0.4; charset=utf-8"],
    }
    streams = {
        name: media["text/event-stream"]["schema"]["contentSchema"]["$ref"].rpartition("/")[2]
        for (name, status), media in content.items()
        # Streams of the OpenAI API are described in words.
        if "text/event-stream" in media and name not in OPENAI
    }
    assert streams == {
        "generate": "GenerationEvent",
        "generate_hermes": "GenerationEvent",
        "generate_phi3": "GenerationEvent",
        "propose_trade_adjustments": "GenerationEvent",
        "stream_audio": "AudioEvent",
        "stream_events": "StreamEvent",
    }


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
    rating = {"X-Hermes-Answer-Mass", "X-Hermes-Score-Reliable"}
    own = {
        name: headers - everywhere
        for (name, status), headers in declared.items()
        if status == "200"
    }
    assert {name: headers for name, headers in own.items() if headers} == {
        "generate": generation | {"X-Grounded", REPLAYED},
        "generate_hermes": generation | {REPLAYED},
        "generate_phi3": generation | {"X-Grounded", REPLAYED},
        "propose_trade_adjustments": generation
        | rating
        | {"X-Grounded", "X-Hermes-Score", "X-Stored", REPLAYED},
        "score_hermes": rating | {"X-Stored", REPLAYED},
        "submit_feedback": {"X-Feedback-ID", REPLAYED},
        "swap_adapters": {REPLAYED},
        "requeue_dead_letter": {REPLAYED},
        "speak": {"X-Voice", "X-Voice-Reference"},
        "create_chat_completion": generation | {"X-Grounded"},
        "create_completion": generation,
        "create_response": generation | {"X-Grounded"},
        "create_speech": {"X-Voice"},
    }


def test_health_has_the_documented_keys_before_the_parts_start() -> None:
    """`tests/live/test_documentation.py` compares a running server's."""
    health = Sidecar(Settings.from_environ(ENVIRON)).health.report()
    assert Health.model_validate(health, strict=True).model_dump(mode="json") == health


async def test_the_served_document_names_the_server_under_its_root_path(app: FastAPI) -> None:
    for root_path, url in (("", "/"), ("/desk", "/desk")):
        async with client(app, root_path) as asking:
            for slash in ("", "/"):
                served = (await asking.get(f"{root_path}/openapi.json{slash}")).json()
                assert served.pop("servers") == [{"url": url, "description": "This server"}]
                assert served == app.openapi()


KEY = "a-key-of-the-tests-0123"
PROPOSED = (
    '{"ticker":"ABC","action":"pass","new_stop_pct":null,"new_target_pct":null,"confidence":0.5,'
    '"rationale":"Nothing to do."}'
)
FULL = QueueFull("The queue is full.", retry_after=7)
AWAY = DatabaseUnavailable("The disk is full.", retry_after=5)
LATE = DeadlineExceeded("The deadline has passed.", retry_after=5)
INVALID = InvalidRequest("prompt: it takes too many tokens.")
JSON = {"Content-Type": "application/json"}
NAMES = {"feedback_id": "f-1", "id": "1-0", "model": "gpt-4"}
"""Parameters of paths."""
PROMPTED = {"json": {"prompt": "Long ABC."}}
SCORED = {"json": {"proposal": {"ticker": "ABC"}}}
FEEDBACK = {"json": {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "Good."}}
PROPOSE = "/propose_trade_adjustments/"
CHAT = "/v1/chat/completions"
CHATTED = {"json": {"model": "hermes", "messages": [{"role": "user", "content": "Hi."}]}}
COMPLETED = {"json": {"model": "hermes", "prompt": "Hi."}}
RESPOND = "/v1/responses"
RESPONDED = {"json": {"model": "hermes", "input": "Hi."}}
SPOKEN = {"json": {"model": "tts-1", "voice": "alloy", "input": "..."}}
Answers = list[Completion | Exception]
ERRORS: list[tuple[str, str, dict[str, Any], Answers, Answers, int]] = [
    ("POST", "/generate/", PROMPTED, [], [FULL], 429),
    ("POST", "/generate/", {"content": b"{", "headers": JSON}, [], [], 422),
    ("POST", "/generate/hermes/", PROMPTED, [], [LATE], 504),
    ("POST", "/generate/phi3/", PROMPTED, [INVALID], [], 422),
    ("POST", PROPOSE, {"json": {}}, [], [], 422),
    ("POST", PROPOSE, PROMPTED, [FULL], [], 429),
    ("POST", PROPOSE, PROMPTED, [completion(PROPOSED)], [INVALID], 422),
    ("POST", PROPOSE, PROMPTED, [completion(PROPOSED)], [FULL], 429),
    ("POST", PROPOSE, PROMPTED, [completion(PROPOSED)], [AWAY], 503),
    ("POST", PROPOSE, PROMPTED, [completion(PROPOSED)], [LATE], 504),
    ("POST", "/score/hermes/", SCORED, [], [FULL], 429),
    ("POST", "/score/hermes/", {"content": b"1", "headers": JSON}, [], [], 422),
    ("POST", "/score/hermes/", {"content": b"{}"}, [], [], 415),
    ("POST", "/score/hermes/", {"content": b" " * (9 << 20)}, [], [], 413),
    ("POST", "/feedback/phi3/", FEEDBACK, [], [], 503),
    ("POST", "/adapters/swap", {"json": {"adapter": "newest"}}, [], [], 422),
    ("POST", "/adapters/swap", {"json": {"adapter": "20260131"}}, [], [], 409),
    ("DELETE", "/feedback/{feedback_id}", {}, [], [], 404),
    ("GET", "/examples/", {"params": {"limit": "0"}}, [], [], 422),
    ("GET", "/examples/", {"params": {"before": "nothing"}}, [], [], 422),
    ("GET", "/events/", {"params": {"types": "audio.bytes"}}, [], [], 422),
    ("GET", "/events/", {"headers": {"Last-Event-ID": "1"}}, [], [], 422),
    ("GET", "/events/dead", {"params": {"before": "nothing"}}, [], [], 422),
    ("POST", "/events/dead/{id}/requeue", {}, [], [], 404),
    ("GET", "/debug/prof", {"params": {"path": "\0"}}, [], [], 422),
    ("GET", "/debug/prof", {}, [], [], 404),
    ("GET", "/v1/models/{model}", {}, [], [], 404),
    ("POST", CHAT, {"json": {}}, [], [], 400),
    ("POST", CHAT, {"json": {**CHATTED["json"], "model": "gpt-4"}}, [], [], 404),
    ("POST", CHAT, {"content": b"{}"}, [], [], 415),
    ("POST", CHAT, CHATTED, [], [FULL], 429),
    ("POST", CHAT, CHATTED, [], [LATE], 504),
    ("POST", "/v1/completions", COMPLETED, [], [INVALID], 400),
    ("POST", "/v1/completions", COMPLETED, [], [AWAY], 503),
    ("POST", RESPOND, {"json": {**RESPONDED["json"], "background": True}}, [], [], 400),
    ("POST", RESPOND, {"json": {**RESPONDED["json"], "model": "gpt-4"}}, [], [], 404),
    ("POST", RESPOND, RESPONDED, [], [FULL], 429),
    ("POST", RESPOND, {"json": {**RESPONDED["json"], "stream": True}}, [], [LATE], 504),
    ("POST", "/v1/audio/speech", SPOKEN, [], [], 400),
]


@pytest.mark.parametrize(("method", "path", "sent", "phi3", "hermes", "status"), ERRORS)
async def test_an_error_is_as_documented(
    fake_sidecar: FakeSidecar,
    asking: httpx.AsyncClient,
    document: dict[str, Any],
    method: str,
    path: str,
    sent: dict[str, Any],
    phi3: Answers,
    hermes: Answers,
    status: int,
) -> None:
    fake_sidecar.phi3.answers, fake_sidecar.hermes.answers = list(phi3), list(hermes)
    fake_sidecar.store.full = AWAY if path == "/feedback/phi3/" else None
    response = await asking.request(method, path.format(**NAMES), **sent)
    assert response.status_code == status, response.text
    check_documented(document, document["paths"][path][method.lower()], response)
    if path == PROPOSE and phi3 != [FULL] and phi3:
        assert "transaction_id" in response.json()


async def test_a_refused_key_is_as_documented(
    app_of: Callable[..., FastAPI], document: dict[str, Any]
) -> None:
    async with client(app_of(**ENVIRON, SIDECAR_API_KEYS=KEY)) as asking:
        for method, path, operation in operations(document):
            if "401" in operation["responses"]:
                response = await asking.request(method, path.format(**NAMES))
                assert response.status_code == 401
                check_documented(document, operation, response)


def check_documented(
    document: dict[str, Any], operation: dict[str, Any], response: httpx.Response
) -> None:
    """Compares an answer with the document: its media type, its body, every key, its headers."""
    documented = operation["responses"][str(response.status_code)]
    (media, content), *_ = documented["content"].items()
    assert response.headers["content-type"] == media
    schema = content["schema"] | {"components": document["components"]}
    assert list(OAS31Validator(schema).iter_errors(response.json())) == []
    name = content["schema"]["$ref"].rpartition("/")[2]
    assert set(response.json()) <= set(document["components"]["schemas"][name]["properties"])
    declared = {header.lower() for header in documented["headers"]}
    own = {name for name in response.headers if name.startswith("x-")} - {"x-content-type-options"}
    assert own <= declared
    for header, of in document["components"]["headers"].items():
        if of["required"] and header.lower() in declared:
            assert header in response.headers
    if "retry-after" in declared:
        assert response.headers["Retry-After"].isdigit()

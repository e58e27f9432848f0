"""The OpenAPI document, with what FastAPI cannot derive from the routes: the API keys, the answers
of middleware, and response headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts

from llm_sidecar.settings import Settings
from osiris import docs_page
from osiris.paths import METRICS, OPENAI, PROBES
from osiris.response_headers import HEADERS, declared
from osiris.schemas.events import StreamEvent
from osiris.schemas.generation import GenerationEvent
from osiris.schemas.health import EXAMPLES
from osiris.schemas.speech import AudioEvent

TITLE: Final = "Osiris LLM sidecar"
_SUMMARY: Final = "Trade proposals from a local language model: written, judged, stored, published."
_DESCRIPTION: Final = """\
Phi-3 writes trade proposals, Hermes judges them and answers free-text prompts, and a voice speaks.

* Every path answers with and without its trailing slash.
* Every request body is JSON in UTF-8. Text contains no control characters except tab, newline and
  carriage return.
* A request may have an `X-Request-ID` of 1 to 128 visible ASCII characters. The answer repeats it,
  or has a new one.
* An error is `{"detail": ...}`: a sentence, or for 422 a list of bad fields. Under `/v1` it is the
  error object of the OpenAI API, and bad input is 400.
* If the server has API keys, send one as `Authorization: Bearer KEY` or as `X-API-Key: KEY`.
"""
_TAGS: Final = {
    "generation": "Proposals from Phi-3, free text from Hermes, and both in one request.",
    "scoring": "Hermes' score of a proposal.",
    "feedback": "Feedback on proposals, and the few-shot examples made from it.",
    "events": "The events of the bus as they happen.",
    "speech": "Text to speech, and a stream of all speech.",
    "openai": "The OpenAI API: models, chats, completions, responses, speech.",
    "operations": "Probes, metrics, profiles and adapters.",
}
_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "One of `SIDECAR_API_KEYS`"},
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same, for clients that cannot send a bearer token",
    },
}
_ANYWHERE: Final = {
    "429": "The server or a queue is full; `Retry-After` says when to try again",
    "503": "The server is shutting down, or a model, the voice or the database is missing or "
    "loading; `Retry-After` says when to try again",
}
"""Answers of every operation except probes and metrics, which are never refused."""
_WITH_BODY: Final = {
    "408": "The body did not arrive in time",
    "413": "The request is larger than the server takes",
    "415": "The headers do not declare the body as JSON; the detail names the header",
}
_BAD_INPUT: Final = "Bad input; `param` names the field"
_FOREIGN_HOST: Final = "This Host is not allowed; `ALLOWED_HOSTS` lists the names that are"
_UNAUTHORIZED: Final = "The server has API keys, and the request has none of them"
_RETRY: Final = frozenset({"429", "503", "504"})
_LIMITED_TEXTS: Final = {
    "PromptRequest": ["prompt"],
    "ProposalRequest": ["prompt"],
    "GenerateRequest": ["prompt"],
}


def operation_id(route: APIRoute) -> str:
    """The function's name: short, stable, and unique among the documented routes."""
    return route.name


def document(app: FastAPI, settings: Settings) -> Callable[[], dict[str, Any]]:
    """A function that returns the app's document, and makes it at the first call."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=TITLE,
                version=app.version,
                summary=_SUMMARY,
                description=_DESCRIPTION,
                routes=app.routes,
                tags=[{"name": name, "description": text} for name, text in _TAGS.items()],
            )
            _describe(made, settings)
            app.openapi_schema = made
        return app.openapi_schema

    return openapi


def documented_paths(app: FastAPI) -> dict[str, str]:
    """The documented spelling of each path, by its spelling without the last slash.

    Reads the routes, because making the document takes longer than hundreds of requests.
    """
    documented = [
        str(route.path_format)
        for route in iter_route_contexts(app.routes)
        if isinstance(route.original_route, APIRoute) and route.include_in_schema
    ]
    return {path.rstrip("/"): path for path in (*documented, *docs_page.PATHS)}


def _describe(made: dict[str, Any], settings: Settings) -> None:
    """Adds everything that FastAPI cannot derive."""
    _describe_components(made["components"], settings)
    for path, operation in operations(made):
        _remove_null(operation)
        responses = operation["responses"]
        if is_openai_path(path) and "422" in responses:
            # `openai.errors` changes the status of the response in the same way.
            responses["400"] = {**responses.pop("422"), "description": _BAD_INPUT}
        for status, response in responses.items():
            # FastAPI gives errors the content type of the route's answer, which may be audio.
            if int(status) >= HTTPStatus.BAD_REQUEST and len(response.get("content", {})) == 1:
                response["content"] = {"application/json": response["content"].popitem()[1]}
        if path not in PROBES:
            _add_refusals(operation, path, settings)
        for status, response in responses.items():
            names = ["X-Request-ID", "traceresponse"]
            if status in _RETRY and path not in PROBES:
                names.append("Retry-After")
            if status == "401":
                names.append("WWW-Authenticate")
            response.setdefault("headers", {}).update(declared(*names))
        operation["responses"] = dict(sorted(responses.items()))


def _describe_components(components: dict[str, Any], settings: Settings) -> None:
    components["securitySchemes"] = _SCHEMES
    components["headers"] = HEADERS
    # No route returns these models: they describe the events of a stream.
    for event in (AudioEvent, GenerationEvent, StreamEvent):
        components["schemas"][event.__name__] = event.model_json_schema()
    for field, example in EXAMPLES.items():
        components["schemas"]["Health"]["properties"][field]["examples"] = [example]
    for schema, fields in _LIMITED_TEXTS.items():
        for field in fields:
            components["schemas"][schema]["properties"][field]["maxLength"] = (
                settings.limits.max_prompt_chars
            )


def _remove_null(operation: dict[str, Any]) -> None:
    """Removes null from an optional body: FastAPI allows it there, and `CheckedRoute` does not."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        choices = content["schema"].get("anyOf", [])
        if {"type": "null"} in choices:
            (content["schema"],) = (choice for choice in choices if choice != {"type": "null"})


def is_openai_path(path: str) -> bool:
    """Whether a documented path belongs to the OpenAI API."""
    return path.startswith(f"{OPENAI}/")


def operations(made: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, operation) for every operation of a document."""
    for path, methods in made["paths"].items():
        for operation in methods.values():
            yield path, operation


def _add_refusals(operation: dict[str, Any], path: str, settings: Settings) -> None:
    """Adds the answers of middleware, which come before the route."""
    model = "OpenAIError" if is_openai_path(path) else "ErrorBody"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}
    refusals: dict[str, str] = {}
    if path != METRICS:
        refusals |= _ANYWHERE
        if settings.access.allowed_hosts:
            refusals["400"] = _FOREIGN_HOST
    if "requestBody" in operation:
        refusals |= _WITH_BODY
    needs_key = path != METRICS or settings.access.metrics_need_key
    if needs_key:
        refusals["401"] = _UNAUTHORIZED
        # In OpenAPI, an empty requirement means that no key is needed.
        none_needed: list[dict[str, list[str]]] = [] if settings.access.api_keys else [{}]
        operation["security"] = [{name: []} for name in _SCHEMES] + none_needed
    for status, description in refusals.items():
        response = operation["responses"].setdefault(status, {"content": content})
        if status == "400" and "description" in response:
            description = f"{response['description']}; or {description[0].lower()}{description[1:]}"
        response["description"] = description

"""What the OpenAPI document says of every route: API keys, and what is answered before a route."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from llm_sidecar.settings import Settings
from osiris.paths import METRICS, PROBES

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
    "408": "The body did not arrive in time",
    "413": "The request is larger than the server takes",
    "429": "As many requests are at work, wait or listen as may; `Retry-After` says when to try "
    "again",
    "503": "The server is shutting down, or a model, the voice or the database is missing or "
    "loading; `Retry-After` says when to try again",
}
_NOT_JSON: Final = "The body is not JSON; the detail names the header that says so"
_FOREIGN_HOST: Final = "The server does not answer under this Host; `ALLOWED_HOSTS` lists the names"
_UNAUTHORIZED: Final = "The server has API keys, and none of them was sent"
_LIMITED_TEXTS: Final = {"PromptRequest": ["prompt"], "GenerateRequest": ["prompt"]}


def document(app: FastAPI, settings: Settings) -> Callable[[], dict[str, Any]]:
    """The function that gives the app's document, which it makes once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _describe(made, settings)
            app.openapi_schema = made
        return app.openapi_schema

    return openapi


def _describe(made: dict[str, Any], settings: Settings) -> None:
    components = made["components"]
    components["securitySchemes"] = _SCHEMES
    for schema, fields in _LIMITED_TEXTS.items():
        for field in fields:
            components["schemas"][schema]["properties"][field]["maxLength"] = (
                settings.max_prompt_chars
            )
    for path, operations in made["paths"].items():
        for operation in operations.values():
            if path not in PROBES:
                _describe_operation(operation, path, settings)


def _describe_operation(operation: dict[str, Any], path: str, settings: Settings) -> None:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    responses = operation["responses"]
    for status, response in responses.items():
        # FastAPI gives errors the content type of the route's own answer, be it a sound.
        if int(status) >= HTTPStatus.BAD_REQUEST and len(response.get("content", {})) == 1:
            response["content"] = {"application/json": response["content"].popitem()[1]}
    if path != METRICS:
        for status, description in _ANYWHERE.items():
            responses[status] = {"description": description, "content": content}
        if settings.allowed_hosts:
            responses["400"] = {"description": _FOREIGN_HOST, "content": content}
    if "requestBody" in operation:
        responses["415"] = {"description": _NOT_JSON, "content": content}
    if path == METRICS and not settings.metrics_need_key:
        return
    responses["401"] = {"description": _UNAUTHORIZED, "content": content}
    # An empty requirement is OpenAPI's way to say that none is needed.
    none_needed: list[dict[str, list[str]]] = [] if settings.api_keys else [{}]
    operation["security"] = [{name: []} for name in _SCHEMES] + none_needed

"""OpenAI's OpenAPI document, cut to the paths that the sidecar serves, without its prose.

    python -m tests.openai_document openapi.json

writes `tests/openai.json`, one line for each path and schema. The argument is OpenAI's document, as
JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

COPY: Final = Path(__file__).with_name("openai.json")
_OPERATIONS: Final = {
    "/audio/speech": ("post",),
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
    "/responses": ("post",),
}
_PROSE: Final = {"description", "example", "examples", "externalDocs", "summary", "tags", "title"}
_NAMED: Final = {"properties", "schemas", "responses", "headers", "content"}
"""The keys in their values are names, which may equal keys of prose."""


def cut(document: Mapping[str, Any]) -> dict[str, Any]:
    """The paths of `_OPERATIONS` and the schemas that they use.

    Args:
        document: OpenAPI.
    """
    paths = {
        path: {method: _operation(document["paths"][path][method]) for method in methods}
        for path, methods in _OPERATIONS.items()
    }
    schemas = document["components"]["schemas"]
    return {
        "openapi": document["openapi"],
        "info": {"title": "OpenAI's API", "version": document["info"]["version"]},
        "security": [{"ApiKeyAuth": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"ApiKeyAuth": {"scheme": "bearer", "type": "http"}},
            "schemas": used(paths, {name: _without_prose(each) for name, each in schemas.items()}),
        },
    }


def used(root: Any, schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas that `root` refers to, directly or indirectly, sorted by name."""
    found: set[str] = set()
    waiting = _references(root)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting |= _references(schemas[name])
    return {name: schemas[name] for name in sorted(found)}


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return set()


def _operation(operation: Mapping[str, Any]) -> dict[str, Any]:
    """An operation without references to the responses of errors."""
    answers = {
        # An answer needs a description.
        status: {"description": "", **_without_prose(answer)}
        for status, answer in operation["responses"].items()
        if "$ref" not in answer
    }
    return {**_without_prose(operation), "responses": answers}


def _without_prose(value: Any, has_names: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_prose(each, key in _NAMED and not has_names)
            for key, each in value.items()
            if has_names or not (key in _PROSE or key.startswith("x-"))
        }
    if isinstance(value, list):
        return [_without_prose(each) for each in value]
    return value


def lines(document: Mapping[str, Any]) -> str:
    """The document as JSON with a line for each path and schema."""
    *most, (_, components) = document.items()
    parts = [f"{_compact(key)}: {_compact(value)}" for key, value in most if key != "paths"]
    schemes, schemas = components["securitySchemes"], components["schemas"]
    parts.append(f'"paths": {_members(document["paths"])}')
    parts.append(
        f'"components": {{"securitySchemes": {_compact(schemes)}, "schemas": {_members(schemas)}}}'
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _members(value: Mapping[str, Any]) -> str:
    return "{\n" + ",\n".join(f"{_compact(k)}: {_compact(v)}" for k, v in value.items()) + "\n}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


if __name__ == "__main__":
    COPY.write_text(lines(cut(json.loads(Path(sys.argv[1]).read_text()))))

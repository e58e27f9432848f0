"""The paths under /v1 compared with OpenAI's own OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests import openai_document
from tests.live_server import LiveServer, serve
from tests.openai_supported import corrected, supported
from tests.schemathesis_run import find_faults

KEY = "a-key-of-the-tests-0123"
OPTIONS = openai_document.COPY.with_name("openai_schemathesis.toml")
# Not negative_data_rejection: fields that are ignored may have any value. The sidecar's own
# document, which tests/live/test_openapi.py uses, has the fields that it reads.
CHECKS = (
    "not_a_server_error,content_type_conformance,response_schema_conformance,"
    "positive_data_acceptance"
)
DOCUMENT: dict[str, Any] = json.loads(openai_document.COPY.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("openai")
    environ = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "SIDECAR_API_KEYS": KEY}
    with serve(folder, **environ) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        running.wait_until_ready()
        yield running


def test_every_answer_is_one_of_the_document(server: LiveServer, tmp_path: Path) -> None:
    document = tmp_path / "openai.json"
    document.write_text(json.dumps(supported(DOCUMENT)))
    faults = find_faults(
        f"{server.url}/v1", KEY, tmp_path, document=document, options=OPTIONS, checks=CHECKS
    )
    assert not faults, faults
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("path", "fields", "schema"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Long AAPL."}], "logprobs": True},
            "CreateChatCompletionStreamResponse",
        ),
        ("/v1/responses", {"input": "Long AAPL."}, "ResponseStreamEvent"),
    ],
    ids=["chat", "responses"],
)
def test_every_event_is_one_of_the_document(
    server: LiveServer, path: str, fields: dict[str, Any], schema: str
) -> None:
    answer = server.client.post(path, json={"model": "hermes", "stream": True, **fields})
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    described = {**corrected(DOCUMENT), "$ref": f"#/components/schemas/{schema}"}
    validator = jsonschema.Draft202012Validator(described)
    for line in lines:
        validator.validate(json.loads(line.removeprefix("data: ")))
    assert len(lines) > 2

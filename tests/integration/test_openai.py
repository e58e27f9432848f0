"""The OpenAI API over a real engine: the demo model of phi3, in a worker process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from llm_sidecar.models.files import DEMO_DIR
from tests.in_process import in_process
from tests.unit.openai.events import chunks_of

PROMPT = "Short TSLA @ 244, broke support at 240.50, ATR 3.4%"
TREE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "tree",
        "parameters": {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "integer", "minimum": 0, "maximum": 3},
                        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                    },
                    "required": ["value"],
                }
            },
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/node"}},
            "required": ["root"],
        },
    },
}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(tmp_path, SIDECAR_DEMO="true") as made:
        yield made


async def chat(client: httpx.AsyncClient, content: str, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    body = {"model": "phi3", "messages": messages, "temperature": 0, **fields}
    return await client.post("/v1/chat/completions", json=body)


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def test_chats_and_completions_of_a_real_model(client: httpx.AsyncClient) -> None:
    await check_proposals(client)
    await check_schemas(client)
    await check_tools(client)
    await check_context(client)
    await check_echo(client)
    await check_responses(client)


async def check_proposals(client: httpx.AsyncClient) -> None:
    """A chat is answered with the proposal of `/generate/phi3/`, whole and as a stream."""
    generated = await client.post("/generate/phi3/", json={"prompt": PROMPT})
    whole = await chat(client, PROMPT)
    (choice,) = whole.json()["choices"]
    assert json.loads(choice["message"]["content"]) == generated.json()
    assert whole.headers["X-Grounded"] == generated.headers["X-Grounded"]
    chunks = chunks_of(await chat(client, PROMPT, stream=True))
    pieces = [one["choices"][0]["delta"].get("content", "") for one in chunks]
    assert "".join(pieces) == choice["message"]["content"]


async def check_schemas(client: httpx.AsyncClient) -> None:
    """Answers follow a schema, and a keyword that is not supported is named."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"side": {"enum": ["LONG", "SHORT"]}, "size": {"const": 7}},
        "required": ["side", "size"],
    }
    (choice,) = (await chat(client, PROMPT, response_format=schema_format(schema))).json()[
        "choices"
    ]
    answer = json.loads(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    assert list(answer) == ["side", "size"]
    assert answer["size"] == 7
    refused = await chat(client, PROMPT, response_format=schema_format({"not": {"type": "null"}}))
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "response_format: not is not supported; leave it out"
    )


async def check_tools(client: httpx.AsyncClient) -> None:
    """A tool whose schema refers to itself is called; one with a bad schema is refused."""
    (choice,) = (await chat(client, PROMPT, tools=[TREE], tool_choice="required")).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "tree"
    assert set(json.loads(call["function"]["arguments"])["root"]) <= {"value", "next"}
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"not": {}}}}
    refused = await chat(client, PROMPT, tools=[TREE, bad])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


async def check_context(client: httpx.AsyncClient) -> None:
    """An answer without a limit takes what the context leaves."""
    config = json.loads((DEMO_DIR / "phi3" / "genai_config.json").read_bytes())
    long = "X" * (config["model"]["context_length"] - 200)
    boolean = schema_format({"type": "boolean"})
    fitting = await chat(client, long, response_format=boolean)
    assert fitting.json()["choices"][0]["message"]["content"] in ("true", "false")
    refused = await chat(client, long, response_format=boolean, max_tokens=1000)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def check_echo(client: httpx.AsyncClient) -> None:
    """The log probabilities of an echo are those of the completion; a prompt of tokens is echoed as
    text."""

    async def complete(**fields: Any) -> dict[str, Any]:
        body = {"model": "phi3", "temperature": 0, "logprobs": 1, **fields}
        response = await client.post("/v1/completions", json=body)
        (choice,) = response.json()["choices"]
        found: dict[str, Any] = choice
        return found

    first = await complete(prompt="Long A", max_tokens=2)
    echo = await complete(prompt="Long A" + first["text"], max_tokens=1, echo=True)
    tokens, logprobs = (echo["logprobs"][name] for name in ("tokens", "token_logprobs"))
    assert "".join(tokens[:-1]) == "Long A" + first["text"]
    assert logprobs[0] is None
    assert first["logprobs"]["tokens"] == tokens[-3:-1]
    assert first["logprobs"]["token_logprobs"] == pytest.approx(logprobs[-3:-1], abs=1e-4)
    for position in (-3, -2):
        assert logprobs[position] == max(echo["logprobs"]["top_logprobs"][position].values())
    for token, offset in zip(tokens, echo["logprobs"]["text_offset"], strict=True):
        assert echo["text"][offset:].startswith(token)
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "phi3" / "tokenizer.json"))
    ids = tokenizer.encode("Long A", add_special_tokens=False).ids
    alone = await complete(prompt=ids, max_tokens=0, echo=True, logprobs=None)
    assert (alone["text"], alone["finish_reason"], alone["logprobs"]) == ("Long A", "length", None)


async def check_responses(client: httpx.AsyncClient) -> None:
    """A response is the same proposal, whole and as a stream; a call has the tool that it has to;
    a prompt that does not fit is named."""
    body: dict[str, Any] = {"model": "phi3", "input": PROMPT, "temperature": 0}
    generated = await client.post("/generate/phi3/", json={"prompt": PROMPT})
    whole = await client.post("/v1/responses", json=body)
    (message,) = whole.json()["output"]
    text = message["content"][0]["text"]
    assert json.loads(text) == generated.json()
    assert whole.headers["X-Grounded"] == generated.headers["X-Grounded"]
    events = chunks_of(await client.post("/v1/responses", json={**body, "stream": True}))
    assert "".join(event.get("delta", "") for event in events) == text
    usage = events[-1]["response"]["usage"]
    assert usage["total_tokens"] == whole.json()["usage"]["total_tokens"]
    tool = {"type": "function", **TREE["function"]}
    called = {**body, "tools": [tool], "tool_choice": "required", "max_output_tokens": 64}
    (call,) = (await client.post("/v1/responses", json=called)).json()["output"]
    assert call["name"] == "tree"
    too_long = {**body, "text": {"format": {"type": "text"}}, "max_output_tokens": 1 << 20}
    long = await client.post("/v1/responses", json=too_long)
    assert (long.status_code, long.json()["error"]["param"]) == (400, "input")
    assert long.json()["error"]["code"] == "context_length_exceeded"

"""Remote models over HTTP: a hostile server, llama.cpp's server, and another sidecar."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.llama_server import LlamaServer, Options
from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
    SidecarError,
)
from llm_sidecar.models.base import Completion, GenerationRequest
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.remote.connection import Connection
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.models.remote.regex import schema_regex
from llm_sidecar.models.remote.silence import silence_limit
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.propose import Proposer
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.metrics import MetricsSink
from osiris.schemas.health import Health
from osiris.server import create_app
from tests.completions import complete
from tests.gguf_files import write_gguf
from tests.hostile_server import (
    HEAD,
    PROPOSAL,
    Behaviour,
    HostileServer,
    Write,
    event,
    proposing,
)
from tests.in_process import in_process
from tests.live_server import free_port
from tests.unit.fakes import last_of

CONTEXT = "Long AAPL from 182.40, now 191.10, RSI 78."
ASK = GenerationRequest([{"role": "user", "content": "Hold?"}], 64)
TIMES = 20
"""Proposals of each server."""


@pytest.fixture
async def hostile() -> AsyncIterator[HostileServer]:
    async with HostileServer() as server:
        yield server


@pytest.fixture
async def model(hostile: HostileServer) -> AsyncIterator[RemoteModel]:
    made = RemoteModel("phi3", [SecretStr(hostile.url)])
    await made.start()
    yield made
    await made.close()


async def propose(
    model: RemoteModel,
    seconds: float = 20.0,
    context: str = CONTEXT,
    temperature: float = 0.0,
    max_tokens: int = 256,
) -> Proposed:
    proposer = Proposer(model, tuple, MetricsSink(), temperature=temperature, retry=False)
    generating = proposer.generate(context, max_tokens, Deadline.after(seconds))
    return await last_of(generating, Proposed)


# A hostile server


def raw(*pieces: bytes) -> Behaviour:
    """Writes bytes and closes the connection."""

    async def behave(write: Write, body: Any) -> None:
        for piece in pieces:
            await write(piece)

    return behave


async def silent(write: Write, body: Any) -> None:
    """Sends nothing for a minute."""
    await asyncio.sleep(60)


async def silent_midway(write: Write, body: Any) -> None:
    """Begins an answer, then sends nothing for a minute."""
    await write(HEAD + event(PROPOSAL[:20]))
    await asyncio.sleep(60)


async def endless_whitespace(write: Write, body: Any) -> None:
    """Writes whitespace until the client disconnects."""
    await write(HEAD)
    while True:
        await write(event(" " * 100) * 100)


async def endless_comments(write: Write, body: Any) -> None:
    """Keeps the connection alive and never answers."""
    await write(HEAD)
    while True:
        await write(b": wait\n\n" * 1000)


async def endless_line(write: Write, body: Any) -> None:
    """Never ends a line."""
    await write(HEAD)
    while True:
        await write(b"x" * 65_536)


def status(line: str, *headers: str) -> Behaviour:
    """Answers with a status."""
    head = "\r\n".join([f"HTTP/1.1 {line}", "Content-Length: 2", "Connection: close", *headers])
    return raw(f"{head}\r\n\r\n{{}}".encode())


HOSTILE: dict[str, tuple[Behaviour, type[SidecarError], str, int]] = {
    # name: the behaviour, the error, its text, the number of requests
    "cut": (raw(HEAD + event(PROPOSAL[:20])), ModelUnavailable, "ended its answer before", 1),
    "cut line": (raw(HEAD + event(PROPOSAL)[:30]), ModelUnavailable, "ended its answer before", 1),
    "no answer": (raw(), ModelUnavailable, "broke off", 1),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), ModelUnavailable, "broke off", 1),
    "wrong JSON": (raw(HEAD + b"data: {not json\n\n"), ModelUnavailable, "cannot be read", 1),
    "no object": (raw(HEAD + b"data: [1, 2]\n\n"), ModelUnavailable, "cannot be read", 1),
    "prose": (
        raw(HEAD + event("Buy it now.", "stop")),
        ModelUnavailable,
        "did not write a valid proposal",
        2,
    ),
    "another object": (
        raw(HEAD + event('{"ticker": "ABC"}', "stop")),
        ModelUnavailable,
        "did not write a valid proposal",
        2,
    ),
    "whitespace": (
        raw(HEAD + event(" " * 248, "length")),
        ModelUnavailable,
        "did not write a valid proposal",
        2,
    ),
    "endless whitespace": (endless_whitespace, ModelUnavailable, "too many bytes", 1),
    "endless comments": (endless_comments, ModelUnavailable, "too many bytes", 1),
    "endless line": (endless_line, ModelUnavailable, "too long", 1),
    "500": (status("500 Internal Server Error"), ModelUnavailable, "status 500", 1),
    "404": (status("404 Not Found"), ModelUnavailable, "404", 1),
    "302": (status("302 Found", "Location: http://127.0.0.1:1/v1"), ModelUnavailable, "302", 1),
    "503": (status("503 Busy", "Retry-After: 7"), ModelUnavailable, "503", 1),
    "429": (status("429 Too Many", "Retry-After: 7"), QueueFull, "try again in 7 s", 1),
}


@pytest.mark.parametrize("max_tokens", [128, 256])
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_server_gives_an_error_and_never_a_proposal(
    model: RemoteModel, hostile: HostileServer, name: str, max_tokens: int
) -> None:
    hostile.behaviour, kind, said, times = HOSTILE[name]
    if (name, max_tokens) == ("endless line", 128):
        # The maximum size of the answer is less than that of a line.
        said = "too many bytes"
    with pytest.raises(kind) as caught:
        await propose(model, max_tokens=max_tokens)
    assert said in caught.value.detail
    assert hostile.asked == times
    if name in ("503", "429"):
        assert caught.value.retry_after == 7


@pytest.mark.parametrize("behaviour", [silent, silent_midway])
async def test_silence_ends_at_the_deadline(
    model: RemoteModel, hostile: HostileServer, behaviour: Behaviour
) -> None:
    hostile.behaviour = behaviour
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^phi3 did not answer within 0\.3 s"):
        await propose(model, seconds=0.3)
    assert time.monotonic() - began < 5
    # The server observes the disconnect.
    async with asyncio.timeout(5):
        await hostile.disconnected.wait()


def follows_guidance(proposal: dict[str, Any]) -> bool:
    """Whether the expression that servers get for the guidance matches a proposal."""
    text = proposals.dumps(proposals.in_order(proposal))
    return re.fullmatch(schema_regex(proposals.GUIDANCE), text) is not None


async def test_each_kind_of_trouble_fails_and_the_proposals_between_are_valid(
    model: RemoteModel, hostile: HostileServer
) -> None:
    # The last kind makes the server rest.
    assert list(HOSTILE)[-1] == "429"
    for behaviour, kind, said, _ in HOSTILE.values():
        hostile.behaviour = proposing
        assert (await propose(model)).proposal == json.loads(PROPOSAL)
        hostile.behaviour = behaviour
        with pytest.raises(kind) as caught:
            await propose(model)
        assert said in caught.value.detail


async def test_an_invalid_proposal_is_asked_for_once_more(
    model: RemoteModel, hostile: HostileServer
) -> None:
    bodies: list[Any] = []

    async def second_time(write: Write, body: Any) -> None:
        bodies.append(body)
        if len(bodies) == 2:
            await proposing(write, body)
        else:
            await write(HEAD + event("Buy it.", "stop"))

    hostile.behaviour = second_time
    assert (await propose(model)).proposal == json.loads(PROPOSAL)
    first, second = bodies
    # Greedy decoding would repeat the first answer.
    assert (first["temperature"], second["temperature"]) == (0.0, 0.7)
    assert "seed" in second


@pytest.mark.parametrize(
    "changes",
    [
        {"new_stop_pct": -5},
        {"new_target_pct": 1e300},
        {"ticker": "X" * 4000},
        {"rationale": "A" * 5000},
        {"rationale": "It holds for now. Sell it later."},
    ],
)
async def test_a_proposal_that_breaks_the_guidance_is_an_error(
    model: RemoteModel, hostile: HostileServer, changes: dict[str, Any]
) -> None:
    hostile.behaviour = raw(HEAD + event(json.dumps(json.loads(PROPOSAL) | changes), "stop"))
    with pytest.raises(ModelUnavailable, match="did not write a valid proposal"):
        await propose(model)
    assert hostile.asked == 2


async def test_a_client_that_disconnects_ends_the_request(
    model: RemoteModel, hostile: HostileServer
) -> None:
    hostile.behaviour = silent_midway
    async with aclosing(model.stream(ASK)) as stream:
        await anext(stream)
    async with asyncio.timeout(5):
        await hostile.disconnected.wait()
    assert model.status().running == 0


async def test_the_first_text_comes_before_the_last(
    model: RemoteModel, hostile: HostileServer
) -> None:
    go_on = asyncio.Event()

    async def slow(write: Write, body: Any) -> None:
        await write(HEAD + event("Fi"))
        await go_on.wait()
        await write(event("ne.", "stop") + b"data: [DONE]\n\n")

    hostile.behaviour = slow
    async with aclosing(model.stream(ASK)) as stream:
        assert (await anext(stream)).text == "Fi"
        go_on.set()
        assert "".join([delta.text async for delta in stream]) == "ne."


async def test_counts_that_never_come_are_not_waited_for(
    model: RemoteModel, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_end(write: Write, body: Any) -> None:
        await write(HEAD + event("Fine.", "stop"))
        await asyncio.sleep(60)

    monkeypatch.setattr("llm_sidecar.models.remote.asking._USAGE_SECONDS", 0.05)
    hostile.behaviour = no_end
    completion = await complete(model, ASK, Deadline.after(20))
    assert (completion.text, completion.completion_tokens) == ("Fine.", 1)


async def test_silence_in_an_answer_is_bounded(
    model: RemoteModel, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.connection._MOST_SILENCE", 0.05)
    hostile.behaviour = silent_midway
    with pytest.raises(ModelUnavailable, match=r"sent nothing for 0\.05 s"):
        await complete(model, ASK, Deadline.after(20))


async def test_a_server_that_is_back_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.server._RETRY_SECONDS", 0.02)
    async with HostileServer() as first:
        model = RemoteModel("phi3", [SecretStr(first.url)])
        await model.start()
        assert (await propose(model)).proposal == json.loads(PROPOSAL)
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        await propose(model)
    assert model.status().not_ready is not None
    async with HostileServer(first.port):
        async with asyncio.timeout(10):
            while model.status().not_ready is not None:
                await asyncio.sleep(0.01)
        assert (await propose(model)).proposal == json.loads(PROPOSAL)
    await model.close()


async def test_a_server_that_dies_leaves_the_other_one(hostile: HostileServer) -> None:
    async with HostileServer() as dying:
        model = RemoteModel("phi3", [SecretStr(dying.url), SecretStr(hostile.url)])
        await model.start()
        await asyncio.gather(*(propose(model) for _ in range(4)))
        assert (dying.asked, hostile.asked) == (2, 2)
    await asyncio.gather(*(propose(model) for _ in range(4)))
    assert hostile.asked == 6
    await model.close()


async def test_a_server_that_hangs_leaves_the_other_one(
    hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shortened(connection: Connection, seconds: float | None) -> Any:
        return silence_limit(connection, 0.05 if connection.url == hanging.url else seconds)

    monkeypatch.setattr("llm_sidecar.models.remote.pool.silence_limit", shortened)
    async with HostileServer() as hanging:
        hanging.behaviour = silent
        model = RemoteModel("phi3", [SecretStr(hanging.url), SecretStr(hostile.url)])
        await model.start()
        async with asyncio.timeout(10):
            while {server.state for server in model.status().servers} != {"ready"}:
                await asyncio.sleep(0.01)
        made = await asyncio.gather(*(propose(model) for _ in range(4)))
        assert [proposed.proposal for proposed in made] == [json.loads(PROPOSAL)] * 4
        assert (hanging.asked, hostile.asked) == (2, 4)
        async with asyncio.timeout(5):
            await hanging.disconnected.wait()
        await model.close()


# Through the sidecar


async def test_a_sidecar_without_models_proposes_with_servers(
    hostile: HostileServer, tmp_path: Path
) -> None:
    urls = {"PHI3_URL": hostile.url, "HERMES_URL": hostile.url, "HERMES_REMOTE_KEY": "sk-secret"}
    async with in_process(tmp_path, **urls) as client:
        async with asyncio.timeout(20):
            while (await client.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
        answer = await client.post("/propose_trade_adjustments/", json={"prompt": CONTEXT})
        assert answer.status_code == 200
        assert answer.json()["phi3_proposal"] == json.loads(PROPOSAL)
        # Scored by text, so not reliable.
        assert answer.headers["X-Hermes-Score"] == "0.700000"
        assert float(answer.headers["X-Hermes-Answer-Mass"]) < 1e-6
        health = await client.get("/health")
        Health.model_validate(health.json())
        phi3 = health.json()["models"]["phi3"]
        assert (phi3["state"], phi3["runtime"], phi3["device"]) == ("ready", "remote", None)
        assert phi3["model"] == "phi3/model"
        assert phi3["servers"] == [
            {
                "url": hostile.url,
                "state": "ready",
                "reason": None,
                "model": "model",
                "outstanding": 0,
                "schema": "regex",
                "scores": "text",
                "top_logprobs": 0,
                "adapters": False,
                "decisions_refused": 0,
            }
        ]
        assert "sk-secret" not in health.text
        hostile.behaviour = status("503 Busy", "Retry-After: 7")
        answer = await client.post("/generate/phi3/", json={"prompt": CONTEXT})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")


async def test_an_invalid_proposal_of_a_server_never_leaves_under_v1(
    hostile: HostileServer, tmp_path: Path
) -> None:
    async def second_time(write: Write, body: Any) -> None:
        if hostile.asked % 2 == 0:
            await proposing(write, body)
        else:
            await write(HEAD + event("Buy it now.", "stop"))

    hostile.behaviour = second_time
    async with in_process(tmp_path, PHI3_URL=hostile.url, HERMES_URL=hostile.url) as client:
        body: dict[str, Any] = {"model": "phi3", "messages": [{"role": "user", "content": CONTEXT}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == PROPOSAL
        answer = await client.post("/v1/chat/completions", json=body | {"stream": True})
        assert answer.status_code == 200
        texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks_of(answer)]
        assert [text for text in texts if text] == [PROPOSAL]
    assert hostile.asked == 4


ORDER = {
    "type": "object",
    "properties": {"side": {"enum": ["buy", "sell"]}},
    "required": ["side"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"model": "hermes", "messages": [{"role": "user", "content": "Hold?"}]}


def saying(*texts: str) -> tuple[Behaviour, list[Any]]:
    """Answers each request with the next text; the list gets the bodies of the requests."""
    left, bodies = list(texts), list[Any]()

    async def behave(write: Write, body: Any) -> None:
        bodies.append(body)
        counts = {"prompt_tokens": 5, "completion_tokens": 2}
        await write(HEAD + event(left.pop(0)) + event("", "stop", usage=counts))

    return behave, bodies


def chunks_of(answer: httpx.Response) -> list[Any]:
    """The objects of a stream."""
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_chat_under_v1_is_answered_by_the_server(
    hostile: HostileServer, tmp_path: Path
) -> None:
    hostile.behaviour, bodies = saying("Hold it.", "Hold it.")
    async with in_process(tmp_path, PHI3_URL=hostile.url, HERMES_URL=hostile.url) as client:
        settings = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
        answer = await client.post("/v1/chat/completions", json=CHAT | settings)
        assert answer.status_code == 200
        (choice,) = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hold it.", "stop")
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 2)
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        chunks = chunks_of(answer)
        texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        assert "".join(filter(None, texts)) == "Hold it."
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    first, second = bodies
    assert settings.items() <= first.items()
    assert (first["messages"], first["model"]) == (CHAT["messages"], "model")
    assert second["max_tokens"] == 1024


@pytest.mark.parametrize(
    ("schema_formats", "field"),
    [
        ({"regex"}, "regex"),
        ({"grammar"}, "grammar"),
        ({"json_schema"}, "response_format"),
        (set[str](), None),
    ],
)
async def test_a_schema_of_a_client_is_followed_or_the_answer_is_an_error(
    hostile: HostileServer, tmp_path: Path, schema_formats: set[str], field: str | None
) -> None:
    hostile.schema_formats = schema_formats
    hostile.behaviour, bodies = saying(*['{"side":"buy"}'] * 2, *['{"side":"hold"}'] * 2)
    schema = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}}
    body = CHAT | {"response_format": schema}
    async with in_process(tmp_path, PHI3_URL=hostile.url, HERMES_URL=hostile.url) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == '{"side":"buy"}'
        answer = await client.post("/v1/chat/completions", json=body | {"stream": True})
        assert chunks_of(answer)[-1]["choices"][0]["finish_reason"] == "stop"
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503
        problem = "sent an answer that does not follow its JSON schema"
        assert problem in answer.json()["error"]["message"]
        answer = await client.post("/v1/chat/completions", json=body | {"stream": True})
        assert problem in chunks_of(answer)[-1]["error"]["message"]
    for sent in bodies:
        guides = sent.keys() & {"regex", "grammar", "response_format"}
        assert guides == (set() if field is None else {field})
    if field == "response_format":
        assert bodies[0]["response_format"]["json_schema"]["schema"] == ORDER


async def test_a_sidecar_whose_server_is_not_there_is_not_ready(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    async with in_process(tmp_path, PHI3_URL=url, HERMES_URL=url) as client:
        async with asyncio.timeout(20):
            while (await client.get("/health")).json()["models"]["phi3"]["state"] != "failed":
                await asyncio.sleep(0.01)
        ready = await client.get("/health/ready")
        assert ready.status_code == 503
        assert "cannot be reached" in ready.json()["reasons"]["hermes"]
        answer = await client.post("/generate/phi3/", json={"prompt": CONTEXT})
        assert answer.status_code == 503
        assert "cannot be reached" in answer.json()["detail"]


# llama.cpp's server


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """llama.cpp's own server with a model of random weights, and a key."""
    file = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    options = Options(
        model=str(file), context=8192, slots=4, threads=1, batch=256, cache_mib=64, layers_on_gpu=0
    )
    server = LlamaServer.start(options, program=None)
    yield server
    server.close()


def of_llama(server: LlamaServer, name: str = "phi3") -> RemoteModel:
    url, key = SecretStr(f"http://127.0.0.1:{server._port}/v1"), SecretStr(server._key)
    return RemoteModel(name, [url], key=key, limits=ModelLimits(request_timeout=120.0))


async def test_proposals_of_llama_cpps_server_are_valid(llama: LlamaServer) -> None:
    model = of_llama(llama)
    contexts = [f"Long AB{number} from 182.40, now 191.10." for number in range(TIMES)]
    made = await asyncio.gather(
        *(propose(model, 120.0, context, temperature=1.0) for context in contexts)
    )
    assert all(follows_guidance(one.proposal) for one in made)
    assert all(one.completion.prompt_tokens > 100 for one in made)
    (server,) = model.status().servers
    assert (server.schema, server.scores, server.top_logprobs) == ("grammar", "logprobs", 20)
    await model.close()


async def test_scores_of_llama_cpps_server_have_a_mass(llama: LlamaServer) -> None:
    model = of_llama(llama, "hermes")
    messages = hermes_plugin.score_messages({"ticker": "ABC"})
    scores = await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    assert scores.probabilities.keys() == set(hermes_plugin.SCORE_ANSWERS)
    assert 0.0 <= scores.mass < 1.0
    await model.close()


async def test_a_prompt_that_is_too_long_for_llama_cpps_server_is_refused(
    llama: LlamaServer,
) -> None:
    model = of_llama(llama)
    with pytest.raises(InvalidRequest, match="too long for the context"):
        await propose(model, 120.0, "ABC " * 4000)
    await model.close()


async def test_a_wrong_key_is_named(llama: LlamaServer) -> None:
    url = SecretStr(f"http://127.0.0.1:{llama._port}/v1")
    model = RemoteModel("phi3", [url], key=SecretStr("wrong"))
    with pytest.raises(ModelUnavailable, match=r"refuses the API key \(401\)"):
        await propose(model)
    await model.close()


# Another sidecar


@pytest.fixture
async def sidecar(random_models: dict[str, str], tmp_path: Path) -> AsyncIterator[FastAPI]:
    """A sidecar in this process, with models of random weights."""
    environ = {"LANCEDB_URI": str(tmp_path), "REDIS_URL": "memory://", "TTS_VOICE": "espeak"}
    app = create_app(Settings.from_environ(random_models | environ))
    async with app.router.lifespan_context(app):
        yield app


def of_sidecar(app: FastAPI, name: str) -> RemoteModel:
    transport = httpx.ASGITransport(app=app)
    return RemoteModel(name, [SecretStr("http://sidecar/v1")], transport=transport)


async def test_proposals_of_another_sidecar_are_valid(sidecar: FastAPI) -> None:
    model = of_sidecar(sidecar, "phi3")
    contexts = [f"Long AB{number} from 182.40, now 191.10." for number in range(TIMES)]
    made = await asyncio.gather(
        *(propose(model, 120.0, context, temperature=1.0) for context in contexts)
    )
    assert all(follows_guidance(one.proposal) for one in made)
    assert {one.completion.model for one in made} == {"phi3/phi3"}
    assert all(one.completion.prompt_tokens > 100 for one in made)
    (server,) = model.status().servers
    assert (server.schema, server.scores, server.top_logprobs) == ("json_schema", "logprobs", 20)
    await model.close()


def alike(text: str, texts: Sequence[str]) -> list[str]:
    """The texts that this one begins with, or that begin with it."""
    return [
        other for other in texts if other and (text.startswith(other) or other.startswith(text))
    ]


async def test_scores_of_another_sidecar_are_its_own(sidecar: FastAPI) -> None:
    model = of_sidecar(sidecar, "hermes")
    messages = hermes_plugin.score_messages({"ticker": "ABC"})
    other_hermes = sidecar.state.sidecar.models.hermes
    request = GenerationRequest(messages, 1, temperature=0.0, logprobs=20)
    (first,) = Completion.of([delta async for delta in other_hermes.stream(request)]).logprobs
    texts = [token.data.decode(errors="replace").strip() for token in first.top]
    likely = [text for text in texts if text.isalnum() and alike(text, texts) == [text]][:2]
    # It returns only the 20 most likely tokens.
    other = next(text for text in hermes_plugin.SCORE_ANSWERS if not alike(text, texts))
    choices = (*likely, other)
    own = await other_hermes.score_choices(messages, choices)
    found = await model.score_choices(messages, choices)
    expected = {choice: own.probabilities[choice] for choice in likely} | {other: 0.0}
    assert len(likely) == 2
    assert found.probabilities == pytest.approx(expected, abs=1e-6)
    await model.close()

"""Remote models over HTTP: a hostile server, llama.cpp's server, and another sidecar."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
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
from llm_sidecar.models.base import GenerationRequest
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.models.remote.regex import schema_regex
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
    proposer = Proposer(
        model, tuple, MetricsSink(), temperature=temperature, timeout=seconds, retry=False
    )
    return await last_of(proposer.generate(context, max_tokens), Proposed)


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


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [
        *((name, 256) for name in HOSTILE),
        *((name, 128) for name in ("prose", "another object", "whitespace")),
    ],
)
async def test_a_hostile_server_gives_an_error_and_never_a_proposal(
    model: RemoteModel, hostile: HostileServer, name: str, max_tokens: int
) -> None:
    hostile.behaviour, kind, said, times = HOSTILE[name]
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


async def test_twenty_proposals_among_all_kinds_of_trouble_are_valid_or_errors(
    model: RemoteModel, hostile: HostileServer
) -> None:
    behaviours = itertools.cycle([proposing, *(row[0] for row in HOSTILE.values())])
    valid = 0
    for behaviour, _ in zip(behaviours, range(TIMES), strict=False):
        hostile.behaviour = behaviour
        try:
            proposed = await propose(model)
        except (ModelUnavailable, QueueFull):
            continue
        assert follows_guidance(proposed.proposal)
        valid += 1
    assert valid >= 1


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
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        assert [text for text in texts if text] == [PROPOSAL]
    assert hostile.asked == 4


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


async def test_scores_of_another_sidecar_are_its_own(sidecar: FastAPI) -> None:
    model = of_sidecar(sidecar, "hermes")
    messages = hermes_plugin.score_messages({"ticker": "ABC"})
    there = sidecar.state.sidecar.models.hermes
    own = await there.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    found = await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    # It returns only the 20 most likely tokens.
    for choice, share in found.probabilities.items():
        assert share in (0.0, pytest.approx(own.probabilities[choice], abs=1e-6)), choice
    await model.close()

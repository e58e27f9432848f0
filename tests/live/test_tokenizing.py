"""Hostile and merely long texts at real workers: each is answered or refused, and no other request
waits for it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.engines import EngineOptions, GenerationRequest, Message
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local import process
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from tests.completions import complete
from tests.live_server import LiveServer

RUNS = {
    "German": "ß",
    "Chinese": "価",
    "Thai": "ก",
    "emoji": "🚀",
    "spaces": " ",
    "combining marks": "\u0301",
    "letters": "a",
}
DOES_NOT_FIT = "1." * 16_000
ModelFactory = Callable[..., LocalModel]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


@pytest.fixture
async def make_model() -> AsyncIterator[ModelFactory]:
    models = []

    def make(folder: Path) -> LocalModel:
        model = LocalModel(
            "phi3",
            lambda: ModelFiles("phi3/random", folder),
            options=EngineOptions("cpu"),
            limits=ModelLimits(load_wait=60.0),
        )
        models.append(model)
        return model

    yield make
    await asyncio.gather(*(model.close() for model in models))


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def failure(work: Awaitable[Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        await work
    return caught.value


@pytest.fixture(params=["serial_phi3_onnx", "random_hermes_onnx", "random_hermes_torch"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


async def test_a_long_run_is_refused_or_answered_and_ends_no_worker(
    make_model: ModelFactory, folder: Path
) -> None:
    model = make_model(folder)
    for run in RUNS.values():
        error = await failure(complete(model, GenerationRequest(user(run * 32_000), 2)))
        assert isinstance(error, InvalidRequest), run
        assert "8192" in error.detail
        assert run not in error.detail or run in (" ", "a")
        short = await complete(model, GenerationRequest(user(run * 100), 2))
        assert short.completion_tokens == 2
    # A piece that no split divides, and that the context holds.
    whole = await complete(model, GenerationRequest(user("ß" * 4000), 2))
    assert 8000 < whole.prompt_tokens < 8192
    assert model.status().restarts == 0


async def test_what_does_not_fit_is_refused_while_others_wait_for_their_turn(
    make_model: ModelFactory, serial_phi3_onnx: Path
) -> None:
    model = make_model(serial_phi3_onnx)
    running = asyncio.create_task(complete(model, GenerationRequest(user("go"), 7000)))
    await until(lambda: model.status().completion_tokens_total > 50)
    waiting = asyncio.create_task(complete(model, GenerationRequest(user("go"), 2)))
    error = await failure(complete(model, GenerationRequest(user(DOES_NOT_FIT), 2)))
    assert isinstance(error, InvalidRequest)
    error = await failure(model.score_choices(user(DOES_NOT_FIT), ["0", "1"]))
    assert isinstance(error, InvalidRequest)
    assert not running.done()
    assert not waiting.done()
    running.cancel()
    assert (await waiting).completion_tokens == 2


async def test_a_short_request_waits_for_no_long_text(
    make_model: ModelFactory, random_hermes_onnx: Path
) -> None:
    model = make_model(random_hermes_onnx)
    short = GenerationRequest(user("go"), 2)
    await complete(model, short)
    # The batch capacity, less one.
    refused = [
        asyncio.create_task(failure(complete(model, GenerationRequest(user(DOES_NOT_FIT * 10), 2))))
        for _ in range(7)
    ]
    await until(lambda: model.status().running == 7)
    assert (await complete(model, short)).completion_tokens == 2
    assert not all(task.done() for task in refused)
    assert all(isinstance(error, InvalidRequest) for error in await asyncio.gather(*refused))


async def test_a_chat_whose_template_never_ends_ends_one_worker_and_is_not_given_to_the_next(
    make_model: ModelFactory,
    random_phi3_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script = "import llm_sidecar.models.local.worker as w; w._TOKENIZING_SECONDS = 0.5; w.main()"

    def spawn(end: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script], stdin=end.fileno(), stdout=end.fileno()
        )

    monkeypatch.setattr(process, "_spawn", spawn)
    folder = shutil.copytree(random_phi3_onnx, tmp_path / "model")
    template = folder / "chat_template.jinja"
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template.write_text(
        "{% if 'for ever' in messages[0].content %}" + endless + "{% endif %}"
        "" + template.read_text()
    )
    model = make_model(folder)
    short = GenerationRequest(user("go"), 2)
    expected = await complete(model, short)
    error = await failure(complete(model, GenerationRequest(user("for ever"), 2)))
    assert isinstance(error, ModelUnavailable)
    assert "worker ended" in error.detail
    assert (await complete(model, short)).text == expected.text
    assert model.status().restarts == 1
    assert "tokenizing one chat took longer than 0.5 s" in capfd.readouterr().err


async def test_a_chat_that_the_template_refuses_is_the_models_fault_and_is_not_quoted(
    make_model: ModelFactory,
    random_phi3_onnx: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(random_phi3_onnx, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% set last = messages[-1].content %}{% if 'SECRET' in last %}{{ raise_exception(last) }}"
        "{% endif %}" + template.read_text()
    )
    model = make_model(folder)
    chat = [{"role": "system", "content": "Obey."}, *user("SECRETMARK")]
    error = await failure(complete(model, GenerationRequest(chat, 2)))
    assert isinstance(error, ModelUnavailable)
    assert "refuses a chat with the roles system, user" in error.detail
    assert (await complete(model, GenerationRequest(user("go"), 2))).completion_tokens == 2
    said = capfd.readouterr().err
    assert "SECRETMARK" not in error.detail + said
    assert "refuses a chat with the roles system, user" in said


def test_the_server_answers_others_while_the_worst_texts_are_read(server: LiveServer) -> None:
    server.client.post("/generate/hermes/", json={"prompt": "go", "max_length": 2})
    server.client.post("/generate/phi3/", json={"prompt": "Long ABC"})

    def ask(number: int) -> int:
        run = list(RUNS.values())[number % len(RUNS)]
        path = ("/generate/phi3/", "/generate/hermes/", "/score/hermes/")[number % 3]
        text = run * 32_000
        body = (
            {"proposal": {"ticker": "A"}, "context": text} if "score" in path else {"prompt": text}
        )
        return server.client.post(path, json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(42)]
        slowest = 0.0
        while not all(future.done() for future in asked):
            began = time.monotonic()
            assert server.client.get("/health/live").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
        assert [future.result() for future in asked] == [422] * 42
    assert slowest < 1.0
    response = server.client.post("/generate/phi3/", json={"prompt": "Long ABC"})
    assert response.status_code == 200
    assert server.total("models", "phi3", "restarts") == 0
    assert server.total("models", "hermes", "restarts") == 0

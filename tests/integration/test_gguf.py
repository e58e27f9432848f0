"""A GGUF file as a local model: supervision, cancellation, adapters, and files that are refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import DeadlineExceeded, ModelUnavailable
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.files import locate_phi3
from llm_sidecar.models.local import process
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.options import phi3_options
from llm_sidecar.settings import Settings
from tests.completions import complete
from tests.gguf_files import write_adapter, write_gguf
from tests.live_server import is_running

USER = hermes_plugin.chat_messages("Long ABC.")
SHORT = GenerationRequest(USER, 8)
ENDLESS = GenerationRequest(USER, 4000)

STAND_IN = str(Path(__file__).resolve().parents[1] / "llama_server.py")

ModelFactory = Callable[..., Awaitable[LocalModel]]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("models") / "Tiny.Q4.gguf")


@pytest.fixture
async def make_model(gguf: Path) -> AsyncIterator[ModelFactory]:
    models = []

    async def make(path: Path = gguf, server: Path | None = None) -> LocalModel:
        settings = Settings(models={"phi3_path": path, "llama_server": server})
        model = LocalModel(
            "phi3",
            lambda: locate_phi3(settings),
            options=phi3_options(settings),
            limits=ModelLimits(load_wait=60.0),
            preload=True,
        )
        await model.start()
        models.append(model)
        return model

    yield make
    await asyncio.gather(*(model.close() for model in models))


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def children(pid: int | None) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def llama_of(model: LocalModel) -> int:
    """The process that runs llama.cpp."""
    (child,) = children(model.status().pid)
    return child


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def oom_score(pid: int | str) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text()


def ticks(pid: int) -> int:
    """Processor time that a process has used, in the kernel's ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_a_gguf_file_is_served(make_model: ModelFactory) -> None:
    model = await make_model()
    completion = await complete(model, SHORT)
    assert completion.model == "phi3/Tiny.Q4"
    assert completion.finish_reason == "length"
    assert completion.completion_tokens == 8
    identity = completion.identity
    assert identity is not None
    assert identity.runtime == "llama.cpp"
    assert identity.versions["xllamacpp"].startswith("2026.")
    assert identity.model_files == identity.tokenizer_files
    status = model.status()
    assert (status.state, status.runtime, status.device) == ("ready", "llama.cpp", "cpu")
    assert status.restarts == 0
    guided = GenerationRequest(
        proposals.build_messages("Long ABC"), proposals.MAX_COMPLETION_TOKENS, proposals.GUIDANCE
    )
    proposals.parse((await complete(model, guided)).text)
    echo = GenerationRequest([], 4, text="Long ABC.", logprobs=0, prompt_logprobs=0)
    echoed = await complete(model, echo)
    assert b"".join(token.data for token in echoed.prompt_logprobs) == b"Long ABC."
    assert len(echoed.logprobs) == 4
    scores = await model.score_choices(USER, hermes_plugin.SCORE_ANSWERS)
    assert 0 < scores.mass < 1
    pid = llama_of(model)
    assert oom_score(pid) == oom_score("self")
    await model.close()
    await until(lambda: not is_running(pid))


async def test_closing_a_stream_stops_llama_cpp(make_model: ModelFactory) -> None:
    model = await make_model()
    async with contextlib.aclosing(model.stream(ENDLESS)) as stream:
        await anext(stream)
    llama = llama_of(model)

    async def idle() -> bool:
        before = ticks(llama)
        await asyncio.sleep(0.2)
        return ticks(llama) - before < 5

    async with asyncio.timeout(30):
        while not await idle():
            pass
    assert model.status().running == 0


async def test_a_text_goes_on_while_a_score_is_computed(make_model: ModelFactory) -> None:
    model = await make_model()
    long = [{"role": "user", "content": "Long ABC. " * 300}]
    async with contextlib.aclosing(model.stream(ENDLESS)) as stream:
        await anext(stream)
        score = asyncio.create_task(model.score_choices(long, hermes_plugin.SCORE_ANSWERS))
        deltas = 0
        while not score.done():
            await anext(stream)
            deltas += 1
    assert len(score.result().probabilities) == 11
    assert deltas > 1


async def test_a_cancelled_score_ends_at_once(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that does not end it by then is killed; the score takes longer.
    monkeypatch.setattr(process, "_CANCEL_GRACE", 0.3)
    model = await make_model()
    await complete(model, SHORT)
    pid = model.status().pid
    long = [{"role": "user", "content": "x" * 8100}]
    score = asyncio.create_task(model.score_choices(long, hermes_plugin.SCORE_ANSWERS))
    await until(lambda: model.status().running == 1)
    score.cancel()
    await until(score.done)
    assert (await complete(model, SHORT)).completion_tokens == 8
    assert model.status().pid == pid


async def test_the_deadline_ends_a_text(make_model: ModelFactory) -> None:
    model = await make_model()
    await complete(model, SHORT)
    partial = await complete(model, ENDLESS, Deadline.after(0.5), allow_partial=True)
    assert partial.finish_reason == "deadline"
    assert partial.completion_tokens > 0
    with pytest.raises(DeadlineExceeded):
        await complete(model, ENDLESS, Deadline.after(0.5))


async def test_a_crash_of_llama_cpp_starts_it_again(make_model: ModelFactory) -> None:
    model = await make_model()
    await complete(model, SHORT)
    worker = model.status().pid
    os.kill(llama_of(model), signal.SIGSEGV)
    await until(lambda: model.status().restarts == 1)
    assert model.status().reason == "The phi3 worker ended (signal SIGSEGV)"
    assert (await complete(model, SHORT)).completion_tokens == 8
    assert model.status().pid != worker


async def test_a_crash_of_llama_cpp_fails_a_score_and_a_text_as_one_of_the_worker(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    await complete(model, SHORT)
    long = hermes_plugin.score_messages({"why": "b" * 6000})
    text = asyncio.create_task(complete(model, ENDLESS))
    score = asyncio.create_task(model.score_choices(long, ["0", "1"]))
    await until(lambda: model.status().running == 2)
    os.kill(llama_of(model), signal.SIGKILL)
    for failed in (text, score):
        with pytest.raises(ModelUnavailable, match=r"worker ended while it answered \(signal"):
            await failed


async def test_llama_cpp_ends_with_its_worker(make_model: ModelFactory) -> None:
    model = await make_model()
    await complete(model, SHORT)
    llama = llama_of(model)
    pid = model.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_running(llama))


SERVE = """
import asyncio, sys
from pathlib import Path
from llm_sidecar.models.files import locate_phi3
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.settings import Settings

async def main():
    settings = Settings(models={"phi3_path": Path(sys.argv[1])})
    model = LocalModel("phi3", lambda: locate_phi3(settings), preload=True)
    await model.start()
    while model.status().state != "ready":
        await asyncio.sleep(0.01)
    print(model.status().pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_nothing_outlives_a_sidecar_that_is_killed(gguf: Path) -> None:
    sidecar = subprocess.Popen([sys.executable, "-c", SERVE, str(gguf)], stdout=subprocess.PIPE)
    with sidecar:
        assert sidecar.stdout is not None
        worker = int(sidecar.stdout.readline())
        (llama,) = children(worker)
        sidecar.kill()
    await until(lambda: not is_running(worker) and not is_running(llama))


async def test_an_adapter_is_swapped_under_a_running_request(
    make_model: ModelFactory, tmp_path: Path
) -> None:
    folder = tmp_path / "20260101"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    write_adapter(folder / "adapter.gguf")
    model = await make_model()
    before = (await complete(model, SHORT)).text
    async with contextlib.aclosing(model.stream(ENDLESS)) as stream:
        assert (await anext(stream)).adapter is None
        await model.use_adapter(Adapter(folder))
        assert (await anext(stream)).adapter is None
        after = await complete(model, SHORT)
    assert after.adapter == "20260101"
    assert after.text != before
    assert after.identity is not None
    assert after.identity.adapter_files is not None


async def test_a_file_that_cannot_be_served_fails_without_restarts(
    make_model: ModelFactory, tmp_path: Path
) -> None:
    model = await make_model(write_gguf(tmp_path / "base.gguf", template=None))
    await until(lambda: model.status().state == "failed")
    reason = model.status().reason
    assert reason == (
        "base.gguf has no chat template, so it is a base model; take the model that was trained "
        "for chats, often called Instruct"
    )
    with pytest.raises(ModelUnavailable, match=r"base\.gguf has no chat template"):
        await complete(model, SHORT)
    assert model.status().restarts == 0


async def test_another_llama_server_can_be_named(make_model: ModelFactory, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(
        f"#!{sys.executable}\nfrom runpy import *\nrun_path({STAND_IN!r}, {{}}, '__main__')"
    )
    program.chmod(0o700)
    model = await make_model(server=program)
    completion = await complete(model, SHORT)
    assert completion.completion_tokens == 8
    assert completion.identity is not None
    assert "llama.cpp" in completion.identity.versions
    assert str(program) in command_of(llama_of(model))


async def test_what_a_script_in_llama_server_runs_ends_with_the_worker(
    make_model: ModelFactory, tmp_path: Path
) -> None:
    program = tmp_path / "llama-server"
    # Without `exec`, so that llama.cpp is the script's child.
    program.write_text(f'#!/bin/sh\n{sys.executable} {STAND_IN} "$@"\nexit $?\n')
    program.chmod(0o700)
    model = await make_model(server=program)
    await complete(model, SHORT)
    (llama,) = children(llama_of(model))
    pid = model.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_running(llama))

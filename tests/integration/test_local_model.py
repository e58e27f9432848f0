"""The host of a worker process, with a real worker that runs a model of random weights."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.engines.lora_graph import ADAPTER_FILE
from llm_sidecar.errors import (
    AdapterRejected,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
)
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local import process as worker_process
from llm_sidecar.models.local.model import HostLimits, ModelHost
from llm_sidecar.models.lora import convert_adapter
from llm_sidecar.telemetry.calls import WorkerDeath
from tests.live_server import is_running
from tests.random_models import write_adapter

SHORT = GenerationRequest(proposals.build_messages("Long ABC"), 256, proposals.GUIDANCE)
# Thousands of array items keep a worker busy for seconds, whatever its weights say.
ITEMS = '{"type":"array","minItems":%d,"items":{"type":"integer"}}'
ENDLESS = GenerationRequest(hermes_plugin.chat_messages("count"), 7000, ITEMS % 6900)

# Scripts that stand for a worker, and are counted as one.
HANGS = "import time; time.sleep(600)  # llm_sidecar.models.local.worker"
CRASHES = "import os; input(); os.abort()  # llm_sidecar.models.local.worker"

HostFactory = Callable[..., ModelHost]


@pytest.fixture
async def make_host(random_phi3_onnx: Path) -> AsyncIterator[HostFactory]:
    hosts = []

    def make(
        folder: Path = random_phi3_onnx,
        prefix: Callable[[], GenerationRequest] | None = None,
        guidance: str | None = proposals.GUIDANCE,
        on_death: Callable[[WorkerDeath], None] = lambda death: None,
        **limits: Any,
    ) -> ModelHost:
        host = ModelHost(
            "phi3",
            lambda: ModelFiles("phi3/random", folder),
            device="cpu",
            limits=HostLimits(**{"load_wait": 60.0, **limits}),
            warm_up=GenerationRequest(proposals.build_messages("Hi."), 1, guidance),
            prefix=prefix,
            on_death=on_death,
        )
        hosts.append(host)
        return host

    yield make
    await asyncio.gather(*(host.close() for host in hosts))


@pytest.fixture(scope="module")
def onnx_adapters(
    random_phi3_torch: Path, random_phi3_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two adapters for the random Phi-3 on onnxruntime: 20260101 and 20260102."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [folder / "20260101", folder / "20260102"]
    for day, adapter in enumerate(adapters, 1):
        peft = write_adapter(random_phi3_torch, folder / f"peft{day}", day)
        convert_adapter(peft, random_phi3_onnx, adapter)
    return adapters


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def failure(work: Awaitable[Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        await work
    return caught.value


def tokens(host: ModelHost) -> int:
    count: int = host.status()["completion_tokens_total"]
    return count


async def test_nothing_runs_before_the_first_request(make_host: HostFactory) -> None:
    host = make_host()
    assert host.status()["state"] == "unloaded"
    assert host.status()["pid"] is None
    assert host.available()


async def test_a_completion_comes_with_its_counts(make_host: HostFactory) -> None:
    completion = await make_host().generate(SHORT)
    proposals.parse(completion.text)
    assert completion.model == "phi3/random"
    assert completion.finish_reason == "stop"
    assert completion.prompt_tokens > 100
    assert 0 < completion.completion_tokens <= proposals.MAX_COMPLETION_TOKENS


async def test_a_prompt_is_read_from_where_it_parts_from_an_earlier_one(
    make_host: HostFactory,
) -> None:
    host = make_host()
    first = await host.generate(SHORT)
    assert first.cached_tokens < first.prompt_tokens - 2
    again = await host.generate(SHORT)
    assert again.text == first.text
    assert again.cached_tokens == again.prompt_tokens - 2


def prefix_of(text: str) -> GenerationRequest:
    return proposals.prefix([proposals.Example(text, {"ticker": "ABC"})], 0.0)


def after(prefix: GenerationRequest) -> GenerationRequest:
    return replace(prefix, messages=[*prefix.messages, {"role": "user", "content": "Long ABC"}])


async def test_a_worker_has_read_the_prefix_before_its_first_request(
    make_host: HostFactory,
) -> None:
    prefix = prefix_of(200 * "word ")
    host = make_host(prefix=lambda: prefix)
    completion = await host.generate(after(prefix))
    assert completion.prompt_tokens > 500
    assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_a_new_prefix_is_prepared_beside_the_old_one(make_host: HostFactory) -> None:
    old, new = prefix_of(200 * "old "), prefix_of(200 * "new ")
    current = old
    host = make_host(prefix=lambda: current)
    await host.prepare()  # nothing is loaded yet
    await host.generate(after(old))
    current = new
    await host.prepare()
    for prefix in (new, old):
        completion = await host.generate(after(prefix))
        assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_requests_go_before_a_prefix_that_is_prepared(make_host: HostFactory) -> None:
    prefixes = [prefix_of("short"), prefix_of(3000 * "x "), prefix_of(2500 * "y ")]
    current = prefixes[0]
    host = make_host(prefix=lambda: current)
    await host.generate(SHORT)
    current = prefixes[1]
    replaced = asyncio.create_task(host.prepare())
    await asyncio.sleep(0)
    current = prefixes[2]
    preparing = asyncio.create_task(host.prepare())
    await host.generate(SHORT)
    assert not preparing.done()
    async with asyncio.timeout(60):
        await replaced
        await preparing
    completion = await host.generate(after(prefixes[2]))
    assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_probabilities_come_from_the_worker(make_host: HostFactory) -> None:
    messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, {"ticker": "ABC"})
    found = await make_host().answer_probabilities(messages, hermes_plugin.SCORE_ANSWERS)
    assert list(found) == list(hermes_plugin.SCORE_ANSWERS)


async def test_requests_are_served_first_come_first_served(
    make_host: HostFactory, serial_phi3_onnx: Path
) -> None:
    host, order = make_host(serial_phi3_onnx), []

    async def one(number: int) -> None:
        await host.generate(SHORT)
        order.append(number)

    await asyncio.gather(*(one(number) for number in range(8)))
    assert order == list(range(8))


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry(make_host: HostFactory) -> None:
    host = make_host(queue_length=2)
    running = [asyncio.create_task(host.generate(ENDLESS)) for _ in range(2)]
    await until(lambda: tokens(host) > 0)
    error = await failure(host.generate(SHORT))
    assert isinstance(error, QueueFull)
    assert error.retry_after is not None
    assert error.retry_after >= 1
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await host.generate(SHORT)


async def test_a_deadline_ends_the_generation(make_host: HostFactory) -> None:
    host = make_host(request_timeout=1.5)
    # The first builds the grammar, which can take a second; the second only generates.
    for _ in range(2):
        assert isinstance(await failure(host.generate(ENDLESS)), DeadlineExceeded)
    await stops(host)


async def test_the_deadline_of_a_request_holds_for_its_calls_together(
    make_host: HostFactory,
) -> None:
    host = make_host()
    await host.generate(SHORT)
    os.kill(host.status()["pid"], signal.SIGSTOP)
    # Of its 100.3 s others have had 100.
    deadline = Deadline(time.monotonic() - 100.0, 100.3)
    score = host.answer_probabilities(SHORT.messages, ("0", "1"), deadline)
    for work in (host.generate(SHORT, deadline), score):
        error = await failure(work)
        assert isinstance(error, DeadlineExceeded)
        assert error.retry_after == 1
        assert error.spent is not None
        assert error.spent.before >= 100.0
        assert error.spent.prompt == error.spent.writing == 0.0
    assert time.monotonic() - deadline.began < 110.0
    os.kill(host.status()["pid"], signal.SIGCONT)
    await host.generate(SHORT)
    assert host.status()["restarts"] == 0


async def test_text_that_may_be_partial_comes_as_far_as_it_got(make_host: HostFactory) -> None:
    host = make_host()
    await host.generate(SHORT)
    free, before = replace(ENDLESS, guidance=None), tokens(host)
    part = asyncio.create_task(host.generate(free, Deadline.after(2.0), allow_partial=True))
    await until(lambda: tokens(host) > before + 100)
    os.kill(host.status()["pid"], signal.SIGSTOP)
    completion = await part
    os.kill(host.status()["pid"], signal.SIGCONT)
    assert completion.finish_reason == "deadline"
    assert completion.text
    assert 0 < completion.completion_tokens < free.max_tokens
    await host.generate(SHORT)
    assert host.status()["restarts"] == 0


async def test_cancelling_stops_the_worker_within_a_second(make_host: HostFactory) -> None:
    host = make_host()
    task = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    task.cancel()
    await asyncio.wait([task])
    await stops(host)
    await host.generate(SHORT)


async def stops(host: ModelHost) -> None:
    """Passes when the worker's token counter stands still before a second is over."""
    began = time.monotonic()
    seen, since = tokens(host), began
    while time.monotonic() - since < 0.25:
        await asyncio.sleep(0.01)
        if tokens(host) != seen:
            seen, since = tokens(host), time.monotonic()
    assert since - began < 1.0


async def test_a_killed_worker_fails_its_request_and_the_next_one_succeeds(
    make_host: HostFactory,
) -> None:
    host = make_host()
    task = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    os.kill(host.status()["pid"], signal.SIGKILL)
    error = await failure(task)
    assert isinstance(error, ModelUnavailable)
    assert error.retry_after == 1
    assert "SIGKILL" in error.detail
    before = tokens(host)
    await host.generate(SHORT)
    assert host.status()["restarts"] == 1
    assert tokens(host) > before


async def test_waiting_requests_survive_the_death_of_the_worker(
    make_host: HostFactory, serial_phi3_onnx: Path
) -> None:
    host = make_host(serial_phi3_onnx)
    first = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    waiting = [asyncio.create_task(host.generate(SHORT)) for _ in range(3)]
    await asyncio.sleep(0)
    os.kill(host.status()["pid"], signal.SIGKILL)
    assert isinstance(await failure(first), ModelUnavailable)
    assert len(await asyncio.gather(*waiting)) == 3


async def test_a_worker_that_died_while_idle_is_not_noticed_by_the_next_request(
    make_host: HostFactory,
) -> None:
    host = make_host()
    await host.generate(SHORT)
    os.kill(host.status()["pid"], signal.SIGKILL)
    await host.generate(SHORT)


async def test_a_request_that_cannot_fit_is_invalid_and_the_worker_goes_on(
    make_host: HostFactory,
) -> None:
    host = make_host()
    too_long = GenerationRequest(hermes_plugin.chat_messages("A" * 9000), 5)
    assert isinstance(await failure(host.generate(too_long)), InvalidRequest)
    await host.generate(SHORT)
    assert host.status()["restarts"] == 0


async def test_a_loading_model_is_waited_for_only_so_long(make_host: HostFactory) -> None:
    host = make_host(load_wait=0.0)
    error = await failure(host.generate(SHORT))
    assert isinstance(error, ModelUnavailable)
    assert "still loading" in error.detail
    assert error.retry_after
    await until(host.available)
    await host.generate(SHORT)


async def test_a_model_that_does_not_load_says_why(make_host: HostFactory, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{")
    host = make_host(tmp_path)
    error = await failure(host.generate(SHORT))
    assert isinstance(error, ModelUnavailable)
    assert "could not be loaded" in error.detail
    assert host.status()["state"] == "failed"
    assert host.status()["reason"]
    assert not host.available()


async def test_missing_files_are_found_without_starting_anything() -> None:
    def locate() -> ModelFiles:
        raise ModelUnavailable("set THE_VARIABLE", retry_after=30)

    host = ModelHost("phi3", locate, warm_up=SHORT)
    error = await failure(host.generate(SHORT))
    assert isinstance(error, ModelUnavailable)
    assert error.detail == "set THE_VARIABLE"
    assert host.status()["reason"] == "set THE_VARIABLE"
    await host.close()


async def test_closing_lets_running_requests_end_and_refuses_new_ones(
    make_host: HostFactory,
) -> None:
    host = make_host()
    running = [asyncio.create_task(host.generate(SHORT)) for _ in range(3)]
    await until(lambda: tokens(host) > 0)
    pid = host.status()["pid"]
    closing = asyncio.create_task(host.close(grace=30.0))
    await asyncio.sleep(0)
    assert isinstance(await failure(host.generate(SHORT)), ModelUnavailable)
    assert len(await asyncio.gather(*running)) == 3
    await closing
    assert not is_running(pid)


async def test_closing_ends_a_request_that_outlasts_its_grace(make_host: HostFactory) -> None:
    host = make_host()
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    pid = host.status()["pid"]
    await host.close(grace=0.05)
    assert isinstance(await failure(running), ModelUnavailable)
    assert not is_running(pid)


async def test_torch_generates_requests_together_and_one_that_is_given_up_ends_alone(
    make_host: HostFactory, random_phi3_torch: Path
) -> None:
    host = make_host(random_phi3_torch)
    expected = await host.generate(SHORT)
    endless = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 100)
    texts = [answer.text for answer in await asyncio.gather(*(host.generate(SHORT),) * 3)]
    assert texts == [expected.text] * 3
    # They did not wait for it.
    assert not endless.done()
    assert host.status()["running"] == 1
    endless.cancel()
    await asyncio.wait([endless])
    assert (await host.generate(SHORT)).text == expected.text
    assert host.status()["restarts"] == 0


async def test_a_worker_that_dies_fails_all_that_it_generated_together(
    make_host: HostFactory, random_hermes_onnx: Path
) -> None:
    # onnxruntime itself runs a Llama that is not guided, and generates together.
    host = make_host(random_hermes_onnx, guidance=None)
    endless, short = replace(ENDLESS, guidance=None), GenerationRequest(ENDLESS.messages, 5)
    await host.generate(short)
    running = [asyncio.create_task(host.generate(endless)) for _ in range(3)]
    await until(lambda: host.status()["running"] == 3)
    before = tokens(host)
    await until(lambda: tokens(host) > before + 200)
    os.kill(host.status()["pid"], signal.SIGKILL)
    errors = [await failure(task) for task in running]
    assert all(isinstance(error, ModelUnavailable) for error in errors)
    assert (await host.generate(short)).completion_tokens == 5
    assert host.status()["restarts"] == 1


async def test_an_adapter_that_does_not_load_is_refused_and_all_goes_on(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host()
    await host.generate(SHORT)
    pid = host.status()["pid"]
    adapter = tmp_path / "20260101"
    adapter.mkdir()
    error = await failure(host.swap_adapter(adapter))
    assert isinstance(error, AdapterRejected)
    assert "20260101" in error.detail
    assert host.adapter is None
    assert host.status()["pid"] == pid
    await host.generate(SHORT)


async def test_swapping_adapters_under_load_loses_no_request(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    first, second = onnx_adapters
    host = make_host()
    first_answer = await host.generate(SHORT)
    alone: dict[str | None, str] = {None: first_answer.text}
    pids = {host.status()["pid"]}
    generated = first_answer.completion_tokens
    for adapter in (first, second, first, None):
        running = [asyncio.create_task(host.generate(SHORT)) for _ in range(8)]
        await host.swap_adapter(adapter)
        assert host.adapter == adapter
        answers = await asyncio.gather(*running)
        name = None if adapter is None else adapter.name
        after = await host.generate(SHORT)
        assert after.adapter == name
        assert alone.setdefault(name, after.text) == after.text
        assert all(answer.text == alone[answer.adapter] for answer in answers)
        generated += sum(answer.completion_tokens for answer in (*answers, after))
        pids.add(host.status()["pid"])
    assert len(set(alone.values())) == 3
    assert len(pids) == 5
    assert host.status()["restarts"] == 0
    # The count goes on from one worker to the next.
    assert tokens(host) == generated
    await until(lambda: workers() == {host.status()["pid"]})


async def test_a_swap_waits_for_no_request_and_lets_those_end_that_run(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    host = make_host()
    await until_loaded(host)
    long = replace(ENDLESS, guidance=ITEMS % 4900, max_tokens=5000)
    running = asyncio.create_task(host.generate(long))
    await until(lambda: tokens(host) > 0)
    former = host.status()["pid"]
    await host.swap_adapter(onnx_adapters[0])
    assert not running.done()
    assert workers() == {former, host.status()["pid"]}
    answer = await running
    assert answer.adapter is None
    assert answer.completion_tokens == 5000
    assert (await host.generate(SHORT)).adapter == "20260101"
    await until(lambda: not is_running(former))


async def test_on_torch_new_requests_go_to_the_new_worker_while_old_ones_run(
    make_host: HostFactory, random_phi3_torch: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(random_phi3_torch, tmp_path / "20260101")
    host = make_host(random_phi3_torch)
    former_answer = await host.generate(SHORT)
    former = host.status()["pid"]
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: host.status()["running"] == 1)
    await host.swap_adapter(adapter)
    answer = await host.generate(SHORT)
    assert answer.adapter == "20260101"
    assert answer.text != former_answer.text
    assert not running.done()
    assert is_running(former)
    running.cancel()
    await until(lambda: not is_running(former))


async def test_another_adapter_can_be_taken_where_the_model_does_not_load_with_the_one_in_use(
    make_host: HostFactory, random_phi3_torch: Path, random_phi3_onnx: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "20260101", tmp_path / "20260102"
    convert_adapter(write_adapter(random_phi3_torch, tmp_path / "peft"), random_phi3_onnx, good)
    bad.mkdir()
    host = make_host(random_phi3_onnx, load_wait=5.0)
    host.begin_with(bad)
    assert isinstance(await failure(host.generate(SHORT)), ModelUnavailable)
    assert isinstance(await failure(host.swap_adapter(tmp_path / "nowhere")), AdapterRejected)
    assert host.adapter == bad
    await host.swap_adapter(good)
    assert (await host.generate(SHORT)).adapter == good.name


async def test_a_swap_goes_on_where_the_worker_that_serves_dies_meanwhile(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    host = make_host()
    await host.swap_adapter(onnx_adapters[0])
    pid = host.status()["pid"]
    swapping = asyncio.create_task(host.swap_adapter(onnx_adapters[1]))
    await until(lambda: len(workers()) == 2)
    os.kill(pid, signal.SIGKILL)
    assert (await host.generate(SHORT)).adapter in ("20260101", "20260102")
    await swapping
    assert (await host.generate(SHORT)).adapter == "20260102"
    assert host.status()["restarts"] == 1
    await until(lambda: workers() == {host.status()["pid"]})


async def test_a_replaced_worker_that_dies_fails_its_request_and_counts_as_no_restart(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    deaths: list[WorkerDeath] = []
    host = make_host(on_death=deaths.append)
    await host.swap_adapter(onnx_adapters[0])
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    former = host.status()["pid"]
    await host.swap_adapter(onnx_adapters[1])
    os.kill(former, signal.SIGKILL)
    assert isinstance(await failure(running), ModelUnavailable)
    assert (await host.generate(SHORT)).adapter == "20260102"
    assert host.status()["restarts"] == 0
    ((name, adapter, how, call),) = (
        (death.model, death.adapter, death.how, death.call) for death in deaths
    )
    assert (name, adapter, how) == ("phi3", "20260101", "signal SIGKILL")
    assert call is not None
    assert call.adapter == "20260101"


async def test_a_replaced_worker_that_hangs_is_ended(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    host = make_host(request_timeout=3.0)
    await until_loaded(host)
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    former = host.status()["pid"]
    os.kill(former, signal.SIGSTOP)
    await host.swap_adapter(onnx_adapters[0])
    assert isinstance(await failure(running), DeadlineExceeded | ModelUnavailable)
    await until(lambda: workers() == {host.status()["pid"]})
    assert (await host.generate(SHORT)).adapter == "20260101"


async def test_a_worker_that_dies_is_replaced_with_the_adapter_in_use(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    host = make_host()
    # Nothing is loaded before the swap, so only the adapter is.
    await host.swap_adapter(onnx_adapters[0])
    assert workers() == {host.status()["pid"]}
    assert host.status()["restarts"] == 0
    os.kill(host.status()["pid"], signal.SIGKILL)
    assert (await host.generate(SHORT)).adapter == "20260101"
    assert host.status()["restarts"] == 1


async def test_a_swap_serves_those_who_wait_for_a_first_load(
    make_host: HostFactory, onnx_adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host()
    play_worker(monkeypatch, HANGS)
    waiting = asyncio.create_task(host.generate(SHORT))
    await until(lambda: len(workers()) == 1)
    monkeypatch.undo()
    await host.swap_adapter(onnx_adapters[0])
    assert (await waiting).adapter == "20260101"
    assert host.status()["restarts"] == 0
    await until(lambda: workers() == {host.status()["pid"]})


async def test_swaps_at_once_are_made_in_order_with_two_workers_at_most(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    host = make_host()
    await until_loaded(host)
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    swaps = [
        asyncio.create_task(host.swap_adapter(adapter))
        for adapter in (onnx_adapters[0], None, onnx_adapters[1])
    ]
    most = 0
    seen: list[str | None] = []

    def swapped() -> bool:
        nonlocal most
        most = max(most, len(workers()))
        if host.status()["adapter"] not in seen[-1:]:
            seen.append(host.status()["adapter"])
        if host.adapter == onnx_adapters[0]:
            # The second swap waits for the worker that still has a request.
            running.cancel()
        return all(swap.done() for swap in swaps)

    await until(swapped)
    assert seen == [None, "20260101", None, "20260102"]
    assert most == 2
    assert (await host.generate(SHORT)).adapter == "20260102"


async def test_the_prefix_is_read_before_a_new_worker_takes_over(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    prefix = prefix_of(200 * "word ")
    host = make_host(prefix=lambda: prefix)
    await host.generate(after(prefix))
    await host.swap_adapter(onnx_adapters[0])
    completion = await host.generate(after(prefix))
    assert completion.adapter == "20260101"
    assert completion.prompt_tokens > 500
    assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_a_prefix_that_changes_while_a_worker_loads_is_read_by_it(
    make_host: HostFactory, onnx_adapters: list[Path]
) -> None:
    old, new = prefix_of(200 * "old "), prefix_of(200 * "new ")
    current = old
    host = make_host(prefix=lambda: current)
    await host.generate(after(old))
    swapping = asyncio.create_task(host.swap_adapter(onnx_adapters[0]))
    await until(lambda: len(workers()) == 2)
    current = new
    await host.prepare()
    await swapping
    worker = await host._supervisor.ready(0.0)
    await worker.idle.wait()
    for prefix in (new, old):
        completion = await host.generate(after(prefix))
        assert completion.adapter == "20260101"
        assert completion.prompt_tokens - completion.cached_tokens < 50


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (HANGS, "it did not load within 2 s (MODEL_LOAD_TIMEOUT_SECONDS)"),
        (CRASHES, "its worker ended: signal SIGABRT"),
    ],
)
async def test_an_adapter_that_hangs_or_crashes_its_worker_fails_no_request(
    script: str,
    why: str,
    make_host: HostFactory,
    onnx_adapters: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaths: list[WorkerDeath] = []
    host = make_host(on_death=deaths.append, load_timeout=60.0)
    await host.generate(SHORT)
    pid = host.status()["pid"]
    play_worker(monkeypatch, script)
    monkeypatch.setattr(host._supervisor, "_load_timeout", 2.0)
    swapping = asyncio.create_task(host.swap_adapter(onnx_adapters[0]))
    longest = 0.0
    while not swapping.done():
        began = time.monotonic()
        assert (await host.generate(SHORT)).adapter is None
        longest = max(longest, time.monotonic() - began)
    error = await failure(swapping)
    assert isinstance(error, AdapterRejected)
    assert error.detail == f"The adapter 20260101 is refused: {why}"
    assert longest < 1.0
    assert workers() == {pid}
    assert (host.status()["pid"], host.status()["restarts"], deaths) == (pid, 0, [])


async def test_closing_gives_up_a_swap_that_loads(
    make_host: HostFactory, onnx_adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host()
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    play_worker(monkeypatch, HANGS)
    swaps = [asyncio.create_task(host.swap_adapter(adapter)) for adapter in onnx_adapters]
    await until(lambda: len(workers()) == 2)
    closing = asyncio.create_task(host.close(grace=60.0))
    for swap in swaps:
        with pytest.raises(ModelUnavailable, match="shutting down"):
            await swap
    await until(lambda: workers() == {host.status()["pid"]})
    # The request that runs still has its time.
    assert not closing.done()
    running.cancel()
    await closing
    assert workers() == set()


async def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_goes_on(
    make_host: HostFactory, random_phi3_torch: Path, random_phi3_onnx: Path, tmp_path: Path
) -> None:
    peft = write_adapter(random_phi3_torch, tmp_path / "peft")
    good, bad = tmp_path / "20260101", tmp_path / "20260102"
    convert_adapter(peft, random_phi3_onnx, good)
    shutil.copytree(good, bad)
    content = (bad / ADAPTER_FILE).read_bytes()
    (bad / ADAPTER_FILE).write_bytes(content[:-100])
    host = make_host(random_phi3_onnx)
    await host.swap_adapter(good)
    expected, pid = await host.generate(SHORT), host.status()["pid"]
    error = await failure(host.swap_adapter(bad))
    assert isinstance(error, AdapterRejected)
    assert error.detail == (
        "The adapter 20260102 is refused: adapter.onnx_adapter is no adapter, or only a part of one"
    )
    assert host.adapter == good
    assert await host.generate(SHORT) == replace(expected, cached_tokens=ANY)
    assert host.status()["pid"] == pid


async def test_a_request_that_has_queued_longer_than_a_load_may_take_gets_the_next_worker(
    make_host: HostFactory,
) -> None:
    host = make_host(load_wait=2.0)
    await until_loaded(host)
    running = asyncio.create_task(host.generate(ENDLESS))
    await until(lambda: tokens(host) > 0)
    # However fast the machine is, it does not end by itself.
    os.kill(host.status()["pid"], signal.SIGSTOP)
    waiting = asyncio.create_task(host.generate(SHORT))
    began = time.monotonic()
    await until(lambda: time.monotonic() > began + 2.1)
    os.kill(host.status()["pid"], signal.SIGKILL)
    assert isinstance(await failure(running), ModelUnavailable)
    proposals.parse((await waiting).text)


async def test_closing_refuses_what_still_waits(make_host: HostFactory) -> None:
    host = make_host()
    await host.generate(SHORT)
    running = [asyncio.create_task(host.generate(ENDLESS)) for _ in range(3)]
    await until(lambda: tokens(host) > 200)
    await host.close(grace=0.05)
    async with asyncio.timeout(2):
        errors = [await failure(task) for task in running]
    assert all(isinstance(error, ModelUnavailable) for error in errors)
    with pytest.raises(ModelUnavailable, match="shutting down"):
        host.preload()


@pytest.mark.parametrize("workers_there", [1, 2])
async def test_a_swap_that_is_cancelled_leaves_no_process(
    workers_there: int,
    make_host: HostFactory,
    onnx_adapters: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = make_host()
    await host.generate(SHORT)
    pid = host.status()["pid"]
    play_worker(monkeypatch, HANGS)
    swapping = asyncio.create_task(host.swap_adapter(onnx_adapters[0]))
    # Before its process is there, and when it loads.
    await asyncio.sleep(0)
    await until(lambda: len(workers()) == workers_there)
    swapping.cancel()
    await asyncio.wait([swapping])
    assert swapping.cancelled()
    assert workers() == {pid}
    assert (await host.generate(SHORT)).adapter is None


def workers() -> set[int]:
    """The worker processes of this one, whichever thread started them."""
    lists = (path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    pids = {int(pid) for pids in lists for pid in pids.split()}
    return {
        pid
        for pid in pids
        if is_running(pid) and "llm_sidecar.models.local.worker" in command_line(pid)
    }


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


async def until_loaded(host: ModelHost) -> None:
    host.preload()
    await until(lambda: host.status()["state"] == "ready")


def play_worker(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Lets a script stand for the worker process."""

    def spawn(end: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script], stdin=end.fileno(), stdout=end.fileno()
        )

    monkeypatch.setattr(worker_process, "_spawn", spawn)


@pytest.mark.parametrize(
    "script",
    [
        """print('{"op": "rea', flush=True)""",
        """print("{}", flush=True); input(); input()""",
        """print("nonsense", flush=True); input(); input()""",
    ],
)
async def test_a_worker_that_talks_nonsense_is_ended(
    monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    play_worker(monkeypatch, script)
    worker = await worker_process.WorkerProcess.start("phi3/fake")
    async with asyncio.timeout(10):
        assert isinstance(await failure(worker.load({})), ModelUnavailable)
        await worker.stop()
    assert not worker.alive


async def test_a_worker_that_is_ready_too_late_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # It answers with what it is sent second.
    play_worker(monkeypatch, "input(); print(input(), flush=True)")
    worker = await worker_process.WorkerProcess.start("phi3/fake")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await worker.load({})
    worker._write({"op": "ready"})
    async with asyncio.timeout(10):
        await worker.stop()
    assert worker.info == {"op": "ready"}

"""The local model with a real worker, which runs a model of random weights."""

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
from llm_sidecar.engines import EngineOptions, GenerationRequest, load_engine
from llm_sidecar.engines.lora_graph import ADAPTER_FILE
from llm_sidecar.errors import (
    AdapterRejected,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
)
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.fake import IDENTITY
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local import process, supervisor
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.local.protocol import Check, Died, Load, Ready, encode
from llm_sidecar.models.lora import convert_adapter
from llm_sidecar.telemetry.calls import WorkerDeath
from tests.completions import complete
from tests.live_server import is_running
from tests.random_models import write_adapter

SHORT = GenerationRequest(proposals.build_messages("Long ABC"), 256, proposals.GUIDANCE)
PREFIX = proposals.prefix([], 0.0)
# Thousands of array items keep a worker busy for seconds, whatever its weights say.
ITEMS = '{"type":"array","minItems":%d,"items":{"type":"integer"}}'
ENDLESS = GenerationRequest(hermes_plugin.chat_messages("count"), 7000, ITEMS % 6900)

# Scripts that run instead of a worker; `workers` counts them by the comment.
HANGS = "import time; time.sleep(600)  # llm_sidecar.models.local.worker"
CRASHES = "import os; input(); os.abort()  # llm_sidecar.models.local.worker"

ModelFactory = Callable[..., Awaitable[LocalModel]]


@pytest.fixture
async def make_model(random_phi3_onnx: Path) -> AsyncIterator[ModelFactory]:
    models = []

    async def make(
        folder: Path = random_phi3_onnx,
        *,
        prefix: GenerationRequest | None = PREFIX,
        on_death: Callable[[WorkerDeath], None] = lambda death: None,
        **limits: Any,
    ) -> LocalModel:
        model = LocalModel(
            "phi3",
            lambda: ModelFiles("phi3/random", folder),
            options=EngineOptions("cpu"),
            limits=ModelLimits(**{"load_wait": 60.0, **limits}),
            preload=True,
            on_death=on_death,
        )
        if prefix is not None:
            await model.prefill(prefix)
        models.append(model)
        return model

    yield make
    await asyncio.gather(*(model.close() for model in models))


@pytest.fixture(scope="module")
def onnx_adapters(
    random_phi3_torch: Path, random_phi3_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Adapter]:
    """Two adapters for the random Phi-3 on onnxruntime: 20260101 and 20260102."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [folder / "20260101", folder / "20260102"]
    for day, adapter in enumerate(adapters, 1):
        peft = write_adapter(random_phi3_torch, folder / f"peft{day}", day)
        convert_adapter(peft, random_phi3_onnx, adapter)
    return [Adapter(adapter) for adapter in adapters]


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def failure(work: Awaitable[Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        await work
    return caught.value


def tokens(model: LocalModel) -> int:
    return model.status().completion_tokens_total


def pid_of(model: LocalModel) -> int:
    pid = model.status().pid
    assert pid is not None
    return pid


async def test_nothing_runs_before_the_first_request(make_model: ModelFactory) -> None:
    model = await make_model()
    assert model.status().state == "unloaded"
    assert model.status().pid is None
    assert model.status().not_ready is None


async def test_a_completion_comes_with_its_counts(make_model: ModelFactory) -> None:
    completion = await complete(await make_model(), SHORT)
    proposals.parse(completion.text)
    assert completion.model == "phi3/random"
    assert completion.finish_reason == "stop"
    assert completion.prompt_tokens > 100
    assert 0 < completion.completion_tokens <= proposals.MAX_COMPLETION_TOKENS


async def test_log_probabilities_and_refusals_of_schemas_come_from_the_worker(
    make_model: ModelFactory, random_phi3_onnx: Path
) -> None:
    model = await make_model()
    asked = GenerationRequest([], 3, text="Long ABC. é", logprobs=2, prompt_logprobs=1)
    deltas = [delta async for delta in model.stream(asked)]
    engine = load_engine(random_phi3_onnx, device="cpu")
    own = list(engine.stream(asked))
    first, *others = (delta.prompt_logprobs for delta in deltas)
    assert first == tuple(token for delta in own for token in delta.prompt_logprobs)
    assert not any(others)
    assert b"".join(token.data for token in first) == "Long ABC. é".encode()
    expected = [token for delta in own for token in delta.logprobs]
    assert [token for delta in deltas for token in delta.logprobs] == expected
    error = await failure(complete(model, replace(SHORT, guidance='{"not": {}}')))
    assert isinstance(error, InvalidRequest)
    assert error.detail == "schema: not is not supported; leave it out"


async def test_a_schema_is_refused_before_it_waits_for_its_turn(
    make_model: ModelFactory, serial_phi3_onnx: Path
) -> None:
    model = await make_model(serial_phi3_onnx)
    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    error = await failure(complete(model, replace(SHORT, guidance='{"not": {}}')))
    assert isinstance(error, InvalidRequest)
    assert not running.done()
    running.cancel()


async def test_a_prompt_reuses_the_prefill_of_an_earlier_one(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    first = await complete(model, SHORT)
    assert first.cached_tokens < first.prompt_tokens - 2
    again = await complete(model, SHORT)
    assert again.text == first.text
    assert again.cached_tokens == again.prompt_tokens - 2


def prefix_of(text: str) -> GenerationRequest:
    return proposals.prefix([proposals.Example(text, {"ticker": "ABC"})], 0.0)


def after(prefix: GenerationRequest) -> GenerationRequest:
    return replace(prefix, messages=[*prefix.messages, {"role": "user", "content": "Long ABC"}])


async def test_a_worker_has_prefilled_the_prefix_before_its_first_request(
    make_model: ModelFactory,
) -> None:
    prefix = prefix_of(200 * "word ")
    model = await make_model(prefix=prefix)
    completion = await complete(model, after(prefix))
    assert completion.prompt_tokens > 500
    assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_a_new_prefix_is_prefilled_and_the_old_one_stays(make_model: ModelFactory) -> None:
    old, new = prefix_of(200 * "old "), prefix_of(200 * "new ")
    model = await make_model(prefix=old)
    await complete(model, after(old))
    await model.prefill(new)
    for prefix in (new, old):
        completion = await complete(model, after(prefix))
        assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_requests_run_before_a_prefix_is_prefilled(make_model: ModelFactory) -> None:
    prefixes = [prefix_of("short"), prefix_of(3000 * "x "), prefix_of(2500 * "y ")]
    model = await make_model(prefix=prefixes[0])
    await complete(model, SHORT)
    replaced = asyncio.create_task(model.prefill(prefixes[1]))
    await asyncio.sleep(0)
    prefilling = asyncio.create_task(model.prefill(prefixes[2]))
    await complete(model, SHORT)
    assert not prefilling.done()
    async with asyncio.timeout(60):
        await replaced
        await prefilling
    completion = await complete(model, after(prefixes[2]))
    assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_the_worker_scores_choices(make_model: ModelFactory) -> None:
    messages = hermes_plugin.score_messages({"ticker": "ABC"})
    model = await make_model(prefix=None)
    found = await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    assert list(found.probabilities) == list(hermes_plugin.SCORE_ANSWERS)


async def test_requests_are_served_first_come_first_served(
    make_model: ModelFactory, serial_phi3_onnx: Path
) -> None:
    model, order = await make_model(serial_phi3_onnx), []

    async def one(number: int) -> None:
        await complete(model, SHORT)
        order.append(number)

    await asyncio.gather(*(one(number) for number in range(8)))
    assert order == list(range(8))


async def test_a_full_queue_refuses_at_once_and_names_the_time_to_retry(
    make_model: ModelFactory,
) -> None:
    model = await make_model(queue_length=2)
    running = [asyncio.create_task(complete(model, ENDLESS)) for _ in range(2)]
    await until(lambda: tokens(model) > 0)
    error = await failure(complete(model, SHORT))
    assert isinstance(error, QueueFull)
    assert error.retry_after is not None
    assert error.retry_after >= 1
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await complete(model, SHORT)


async def test_a_deadline_ends_the_generation(make_model: ModelFactory) -> None:
    model = await make_model(request_timeout=1.5)
    await until_loaded(model)
    # The first builds the grammar, which can take a second; the second only generates.
    for _ in range(2):
        assert isinstance(await failure(complete(model, ENDLESS)), DeadlineExceeded)
    await stops(model)


async def test_all_calls_of_a_request_share_its_deadline(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    await complete(model, SHORT)
    os.kill(pid_of(model), signal.SIGSTOP)
    await until(lambda: state_of(pid_of(model)) == "T")
    # Earlier calls have used 100 of its 100.3 s.
    deadline = Deadline(time.monotonic() - 100.0, 100.3)
    score = model.score_choices(SHORT.messages, ("0", "1"), deadline)
    for work in (complete(model, SHORT, deadline), score):
        error = await failure(work)
        assert isinstance(error, DeadlineExceeded)
        assert error.retry_after == 1
        assert error.spent is not None
        assert error.spent.before >= 100.0
        assert error.spent.prefill == error.spent.decode == 0.0
    assert time.monotonic() - deadline.began < 110.0
    os.kill(pid_of(model), signal.SIGCONT)
    await complete(model, SHORT)
    assert model.status().restarts == 0


async def test_partial_text_is_returned_at_the_deadline(make_model: ModelFactory) -> None:
    model = await make_model()
    await complete(model, SHORT)
    free, before = replace(ENDLESS, guidance=None), tokens(model)
    part = asyncio.create_task(complete(model, free, Deadline.after(2.0), allow_partial=True))
    await until(lambda: tokens(model) > before + 100)
    os.kill(pid_of(model), signal.SIGSTOP)
    completion = await part
    os.kill(pid_of(model), signal.SIGCONT)
    assert completion.finish_reason == "deadline"
    assert completion.text
    assert 0 < completion.completion_tokens < free.max_tokens
    await complete(model, SHORT)
    assert model.status().restarts == 0


async def test_cancelling_stops_the_worker_within_a_second(make_model: ModelFactory) -> None:
    model = await make_model()
    task = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    task.cancel()
    await asyncio.wait([task])
    await stops(model)
    await complete(model, SHORT)


async def stops(model: LocalModel) -> None:
    """Passes when the worker's token counter stands still before a second is over."""
    began = time.monotonic()
    seen, since = tokens(model), began
    while time.monotonic() - since < 0.25:
        await asyncio.sleep(0.01)
        if tokens(model) != seen:
            seen, since = tokens(model), time.monotonic()
    assert since - began < 1.0


async def test_a_killed_worker_fails_its_request_and_the_next_one_succeeds(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    task = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    os.kill(pid_of(model), signal.SIGKILL)
    error = await failure(task)
    assert isinstance(error, ModelUnavailable)
    assert error.retry_after == 1
    assert "SIGKILL" in error.detail
    before = tokens(model)
    await complete(model, SHORT)
    assert model.status().restarts == 1
    assert tokens(model) > before


async def test_waiting_requests_survive_the_death_of_the_worker(
    make_model: ModelFactory, serial_phi3_onnx: Path
) -> None:
    model = await make_model(serial_phi3_onnx)
    first = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    waiting = [asyncio.create_task(complete(model, SHORT)) for _ in range(3)]
    await asyncio.sleep(0)
    os.kill(pid_of(model), signal.SIGKILL)
    assert isinstance(await failure(first), ModelUnavailable)
    assert len(await asyncio.gather(*waiting)) == 3


async def test_a_worker_that_died_while_idle_is_not_noticed_by_the_next_request(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    await complete(model, SHORT)
    os.kill(pid_of(model), signal.SIGKILL)
    await complete(model, SHORT)


async def test_a_request_that_does_not_fit_is_invalid_and_the_worker_continues(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    too_long = GenerationRequest(hermes_plugin.chat_messages("A" * 9000), 5)
    assert isinstance(await failure(complete(model, too_long)), InvalidRequest)
    await complete(model, SHORT)
    assert model.status().restarts == 0


async def test_half_of_a_surrogate_pair_is_invalid_and_the_worker_continues(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    request = GenerationRequest(hermes_plugin.chat_messages("\ud800"), 5)
    assert isinstance(await failure(complete(model, request)), InvalidRequest)
    await complete(model, SHORT)
    assert (model.status().restarts, model.status().requests) == (0, 0)


async def test_a_loading_model_is_waited_for_only_so_long(make_model: ModelFactory) -> None:
    model = await make_model(load_wait=0.0)
    error = await failure(complete(model, SHORT))
    assert isinstance(error, ModelUnavailable)
    assert "still loading" in error.detail
    assert error.retry_after
    await until(lambda: model.status().not_ready is None)
    await complete(model, SHORT)


async def test_a_model_with_unusable_files_reports_the_reason_and_loads_once_they_are_replaced(
    make_model: ModelFactory,
    random_phi3_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "genai_config.json"
    config.write_text("{")
    model = await make_model(tmp_path)
    reason = f"{config} does not describe a model; copy it again from the original"
    for _ in range(2):
        error = await failure(complete(model, SHORT))
        assert isinstance(error, ModelUnavailable)
        assert error.detail == f"The phi3 model is not available: {reason}."
    status = model.status()
    assert (status.state, status.reason, status.restarts) == ("failed", reason, 0)
    assert status.not_ready == reason
    monkeypatch.setattr(supervisor, "_FILES_SECONDS", 0.05)
    shutil.copytree(random_phi3_onnx, tmp_path, dirs_exist_ok=True)
    await until(lambda: model.status().state == "ready")
    await complete(model, SHORT)
    assert model.status().restarts == 0


async def test_missing_files_are_found_without_starting_anything() -> None:
    def locate() -> ModelFiles:
        raise ModelUnavailable("set THE_VARIABLE", retry_after=30)

    model = LocalModel("phi3", locate)
    error = await failure(complete(model, SHORT))
    assert isinstance(error, ModelUnavailable)
    assert error.detail == "set THE_VARIABLE"
    assert model.status().reason == "set THE_VARIABLE"
    await model.close()


async def test_closing_lets_running_requests_end_and_refuses_new_ones(
    make_model: ModelFactory,
) -> None:
    model = await make_model()
    running = [asyncio.create_task(complete(model, SHORT)) for _ in range(3)]
    await until(lambda: tokens(model) > 0)
    pid = pid_of(model)
    closing = asyncio.create_task(model.close(grace=30.0))
    await asyncio.sleep(0)
    assert isinstance(await failure(complete(model, SHORT)), ModelUnavailable)
    assert len(await asyncio.gather(*running)) == 3
    await closing
    assert not is_running(pid)


async def test_closing_ends_a_request_that_outlasts_its_grace(make_model: ModelFactory) -> None:
    model = await make_model()
    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    pid = pid_of(model)
    await model.close(grace=0.05)
    assert isinstance(await failure(running), ModelUnavailable)
    assert not is_running(pid)


async def test_a_worker_that_dies_fails_its_whole_batch(
    make_model: ModelFactory, random_hermes_onnx: Path
) -> None:
    # Plain onnxruntime runs a Llama without guidance, in batches.
    model = await make_model(random_hermes_onnx, prefix=None)
    endless, short = replace(ENDLESS, guidance=None), GenerationRequest(ENDLESS.messages, 5)
    await complete(model, short)
    running = [asyncio.create_task(complete(model, endless)) for _ in range(3)]
    await until(lambda: model.status().running == 3)
    before = tokens(model)
    await until(lambda: tokens(model) > before + 200)
    os.kill(pid_of(model), signal.SIGKILL)
    errors = [await failure(task) for task in running]
    assert all(isinstance(error, ModelUnavailable) for error in errors)
    assert (await complete(model, short)).completion_tokens == 5
    assert model.status().restarts == 1


async def test_an_adapter_that_does_not_load_is_refused_and_requests_continue(
    make_model: ModelFactory, tmp_path: Path
) -> None:
    model = await make_model()
    await complete(model, SHORT)
    pid = pid_of(model)
    adapter = tmp_path / "20260101"
    adapter.mkdir()
    error = await failure(model.use_adapter(Adapter(adapter)))
    assert isinstance(error, AdapterRejected)
    assert "20260101" in error.detail
    assert model.status().adapter is None
    assert pid_of(model) == pid
    await complete(model, SHORT)


async def test_swapping_adapters_under_load_loses_no_request(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    first, second = onnx_adapters
    model = await make_model()
    first_answer = await complete(model, SHORT)
    alone: dict[str | None, str] = {None: first_answer.text}
    pids = {pid_of(model)}
    generated = first_answer.completion_tokens
    for adapter in (first, second, first, None):
        running = [asyncio.create_task(complete(model, SHORT)) for _ in range(8)]
        await model.use_adapter(adapter)
        assert model.status().adapter == adapter
        answers = await asyncio.gather(*running)
        name = None if adapter is None else adapter.name
        after = await complete(model, SHORT)
        assert after.adapter == name
        assert alone.setdefault(name, after.text) == after.text
        assert all(answer.text == alone[answer.adapter] for answer in answers)
        generated += sum(answer.completion_tokens for answer in (*answers, after))
        pids.add(pid_of(model))
    assert len(set(alone.values())) == 3
    assert len(pids) == 5
    assert model.status().restarts == 0
    # The count goes on from one worker to the next.
    assert tokens(model) == generated
    await until(lambda: workers() == {pid_of(model)})


async def test_a_swap_waits_for_no_request_and_running_ones_finish(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    model = await make_model()
    await until_loaded(model)
    long = replace(ENDLESS, guidance=ITEMS % 4900, max_tokens=5000)
    running = asyncio.create_task(complete(model, long))
    await until(lambda: tokens(model) > 0)
    former = pid_of(model)
    await model.use_adapter(onnx_adapters[0])
    assert not running.done()
    assert workers() == {former, pid_of(model)}
    answer = await running
    assert answer.adapter is None
    assert answer.completion_tokens == 5000
    assert (await complete(model, SHORT)).adapter == "20260101"
    await until(lambda: not is_running(former))


async def test_torch_generates_a_batch_and_swaps_while_a_request_runs(
    make_model: ModelFactory, random_phi3_torch: Path, tmp_path: Path
) -> None:
    """One test, because a worker with torch takes seconds to start."""
    adapter = write_adapter(random_phi3_torch, tmp_path / "20260101")
    model = await make_model(random_phi3_torch)
    expected = await complete(model, SHORT)
    former = pid_of(model)
    endless = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 100)
    texts = [answer.text for answer in await asyncio.gather(*(complete(model, SHORT),) * 3)]
    assert texts == [expected.text] * 3
    # They did not wait for it.
    assert not endless.done()
    assert model.status().running == 1
    endless.cancel()
    await asyncio.wait([endless])
    # It ended alone.
    assert (await complete(model, SHORT)).text == expected.text
    assert (model.status().restarts, pid_of(model)) == (0, former)

    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: model.status().running == 1)
    await model.use_adapter(Adapter(adapter))
    answer = await complete(model, SHORT)
    assert answer.adapter == "20260101"
    assert answer.text != expected.text
    assert not running.done()
    assert is_running(former)
    running.cancel()
    await until(lambda: not is_running(former))


async def test_an_adapter_can_replace_one_with_which_the_model_does_not_load(
    make_model: ModelFactory, onnx_adapters: list[Adapter], tmp_path: Path
) -> None:
    good, bad = onnx_adapters[0], tmp_path / "20260103"
    bad.mkdir()
    model = await make_model(load_wait=5.0)
    await model.start(Adapter(bad))
    assert isinstance(await failure(complete(model, SHORT)), ModelUnavailable)
    assert isinstance(
        await failure(model.use_adapter(Adapter(tmp_path / "nowhere"))), AdapterRejected
    )
    assert model.status().adapter == Adapter(bad)
    await model.use_adapter(good)
    assert (await complete(model, SHORT)).adapter == "20260101"


async def test_a_swap_continues_if_the_serving_worker_dies(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    model = await make_model()
    await model.use_adapter(onnx_adapters[0])
    pid = pid_of(model)
    swapping = asyncio.create_task(model.use_adapter(onnx_adapters[1]))
    await until(lambda: len(workers()) == 2)
    os.kill(pid, signal.SIGKILL)
    assert (await complete(model, SHORT)).adapter in ("20260101", "20260102")
    await swapping
    assert (await complete(model, SHORT)).adapter == "20260102"
    assert model.status().restarts == 1
    await until(lambda: workers() == {pid_of(model)})


async def test_a_replaced_worker_that_dies_fails_its_request_and_counts_as_no_restart(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    deaths: list[WorkerDeath] = []
    model = await make_model(on_death=deaths.append)
    await model.use_adapter(onnx_adapters[0])
    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    former = pid_of(model)
    await model.use_adapter(onnx_adapters[1])
    os.kill(former, signal.SIGKILL)
    assert isinstance(await failure(running), ModelUnavailable)
    assert (await complete(model, SHORT)).adapter == "20260102"
    assert model.status().restarts == 0
    ((name, adapter, how, call),) = (
        (death.model, death.adapter, death.how, death.call) for death in deaths
    )
    assert (name, adapter, how) == ("phi3", "20260101", "signal SIGKILL")
    assert call is not None
    assert call.adapter == "20260101"


async def test_a_replaced_worker_that_hangs_is_ended(
    make_model: ModelFactory, onnx_adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_EXIT_GRACE", 0.2)
    model = await make_model(request_timeout=3.0)
    await until_loaded(model)
    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    former = pid_of(model)
    os.kill(former, signal.SIGSTOP)
    await model.use_adapter(onnx_adapters[0])
    assert isinstance(await failure(running), DeadlineExceeded | ModelUnavailable)
    await until(lambda: workers() == {pid_of(model)})
    assert (await complete(model, SHORT)).adapter == "20260101"


async def test_a_worker_that_dies_is_replaced_with_the_adapter_in_use(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    model = await make_model()
    # Nothing is loaded before the swap, so only the adapter is.
    await model.use_adapter(onnx_adapters[0])
    assert workers() == {pid_of(model)}
    assert model.status().restarts == 0
    os.kill(pid_of(model), signal.SIGKILL)
    assert (await complete(model, SHORT)).adapter == "20260101"
    assert model.status().restarts == 1


async def test_a_swap_serves_requests_that_wait_for_the_first_load(
    make_model: ModelFactory, onnx_adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await make_model()
    replace_worker(monkeypatch, HANGS)
    waiting = asyncio.create_task(complete(model, SHORT))
    await until(lambda: len(workers()) == 1)
    monkeypatch.undo()
    await model.use_adapter(onnx_adapters[0])
    assert (await waiting).adapter == "20260101"
    assert model.status().restarts == 0
    await until(lambda: workers() == {pid_of(model)})


async def test_concurrent_swaps_run_in_order_with_two_workers_at_most(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    model = await make_model()
    await until_loaded(model)
    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    swaps = [
        asyncio.create_task(model.use_adapter(adapter))
        for adapter in (onnx_adapters[0], None, onnx_adapters[1])
    ]
    most = 0
    seen: list[Adapter | None] = []

    def swapped() -> bool:
        nonlocal most
        most = max(most, len(workers()))
        if model.status().adapter not in seen[-1:]:
            seen.append(model.status().adapter)
        if model.status().adapter == onnx_adapters[0]:
            # The second swap waits for the worker that still has a request.
            running.cancel()
        return all(swap.done() for swap in swaps)

    await until(swapped)
    assert seen == [None, onnx_adapters[0], None, onnx_adapters[1]]
    assert most == 2
    assert (await complete(model, SHORT)).adapter == "20260102"


async def test_the_prefix_is_prefilled_before_a_new_worker_serves(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    prefix = prefix_of(200 * "word ")
    model = await make_model(prefix=prefix)
    await complete(model, after(prefix))
    await model.use_adapter(onnx_adapters[0])
    completion = await complete(model, after(prefix))
    assert completion.adapter == "20260101"
    assert completion.prompt_tokens > 500
    assert completion.prompt_tokens - completion.cached_tokens < 50


async def test_a_worker_that_loads_prefills_a_prefix_that_changes_meanwhile(
    make_model: ModelFactory, onnx_adapters: list[Adapter]
) -> None:
    old, new = prefix_of(200 * "old "), prefix_of(200 * "new ")
    model = await make_model(prefix=old)
    await complete(model, after(old))
    swapping = asyncio.create_task(model.use_adapter(onnx_adapters[0]))
    await until(lambda: len(workers()) == 2)
    await model.prefill(new)
    await swapping
    (worker,) = model._replicas.live()
    await worker.idle.wait()
    for prefix in (new, old):
        completion = await complete(model, after(prefix))
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
    make_model: ModelFactory,
    onnx_adapters: list[Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaths: list[WorkerDeath] = []
    model = await make_model(on_death=deaths.append, load_timeout=60.0)
    await complete(model, SHORT)
    pid = pid_of(model)
    replace_worker(monkeypatch, script)
    monkeypatch.setattr(model._loader, "timeout", 2.0)
    swapping = asyncio.create_task(model.use_adapter(onnx_adapters[0]))
    longest = 0.0
    while not swapping.done():
        began = time.monotonic()
        assert (await complete(model, SHORT)).adapter is None
        longest = max(longest, time.monotonic() - began)
    error = await failure(swapping)
    assert isinstance(error, AdapterRejected)
    assert error.detail == f"The adapter 20260101 is refused: {why}"
    assert longest < 1.0
    assert workers() == {pid}
    assert (pid_of(model), model.status().restarts, deaths) == (pid, 0, [])


async def test_closing_cancels_a_swap_that_loads(
    make_model: ModelFactory, onnx_adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await make_model()
    running = asyncio.create_task(complete(model, ENDLESS))
    await until(lambda: tokens(model) > 0)
    replace_worker(monkeypatch, HANGS)
    swaps = [asyncio.create_task(model.use_adapter(adapter)) for adapter in onnx_adapters]
    await until(lambda: len(workers()) == 2)
    # It would end its text while a slow machine ends the other worker.
    os.kill(pid := pid_of(model), signal.SIGSTOP)
    closing = asyncio.create_task(model.close(grace=60.0))
    for swap in swaps:
        with pytest.raises(ModelUnavailable, match="shutting down"):
            await swap
    await until(lambda: workers() == {pid})
    # The request that runs still has its time.
    assert not closing.done()
    os.kill(pid, signal.SIGCONT)
    running.cancel()
    await closing
    assert workers() == set()


async def test_a_damaged_adapter_is_refused_and_the_old_one_stays(
    make_model: ModelFactory, onnx_adapters: list[Adapter], tmp_path: Path
) -> None:
    good, bad = onnx_adapters[0], tmp_path / "20260102"
    shutil.copytree(good.folder, bad)
    content = (bad / ADAPTER_FILE).read_bytes()
    (bad / ADAPTER_FILE).write_bytes(content[:-100])
    model = await make_model()
    await model.use_adapter(good)
    expected, pid = await complete(model, SHORT), pid_of(model)
    error = await failure(model.use_adapter(Adapter(bad)))
    assert isinstance(error, AdapterRejected)
    assert error.detail == (
        "The adapter 20260102 is refused: adapter.onnx_adapter is not an adapter, or is incomplete"
    )
    assert model.status().adapter == good
    assert await complete(model, SHORT) == replace(expected, cached_tokens=ANY)
    assert pid_of(model) == pid


async def test_closing_fails_requests_that_wait(make_model: ModelFactory) -> None:
    model = await make_model()
    await complete(model, SHORT)
    running = [asyncio.create_task(complete(model, ENDLESS)) for _ in range(3)]
    await until(lambda: tokens(model) > 200)
    await model.close(grace=0.05)
    async with asyncio.timeout(2):
        errors = [await failure(task) for task in running]
    assert all(isinstance(error, ModelUnavailable) for error in errors)
    with pytest.raises(ModelUnavailable, match="shutting down"):
        await complete(model, SHORT)


@pytest.mark.parametrize("workers_there", [1, 2])
async def test_a_swap_that_is_cancelled_leaves_no_process(
    workers_there: int,
    make_model: ModelFactory,
    onnx_adapters: list[Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = await make_model()
    await complete(model, SHORT)
    pid = pid_of(model)
    replace_worker(monkeypatch, HANGS)
    swapping = asyncio.create_task(model.use_adapter(onnx_adapters[0]))
    # Before its process is there, and when it loads.
    await asyncio.sleep(0)
    await until(lambda: len(workers()) == workers_there)
    swapping.cancel()
    await asyncio.wait([swapping])
    assert swapping.cancelled()
    assert workers() == {pid}
    assert (await complete(model, SHORT)).adapter is None


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


def state_of(pid: int) -> str:
    """The state of a process, as `proc_pid_stat(5)` names it: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def until_loaded(model: LocalModel) -> None:
    await model.start()
    await until(lambda: model.status().state == "ready")


def replace_worker(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Runs a script instead of the worker's program."""

    def spawn(end: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script], stdin=end.fileno(), stdout=end.fileno()
        )

    monkeypatch.setattr(process, "_spawn", spawn)


@pytest.mark.parametrize(
    "script",
    [
        """print('{"type": "Rea', flush=True)""",
        """print("{}", flush=True); input(); input()""",
        """print('{"type": "Ready"}', flush=True); input(); input()""",
        """print('{"type": "Done", "id": 7}', flush=True); input(); input()""",
        """print("nonsense", flush=True); input(); input()""",
    ],
)
async def test_a_worker_that_writes_no_valid_message_is_killed(
    monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    replace_worker(monkeypatch, script)
    worker = await process.WorkerProcess.start("phi3/fake")
    async with asyncio.timeout(10):
        assert isinstance(
            await failure(worker.load(Load("/models/phi3", EngineOptions("cpu")))), ModelUnavailable
        )
        await worker.stop()
    assert not worker.alive


@pytest.mark.parametrize(
    "again",
    [
        # The first answers `Load` again; the second is too deep for the parser.
        encode(Ready(IDENTITY, 100, 1)).decode().strip(),
        '{"type": "Done", "id": 1, "more": ' + "[" * 100_000,
    ],
    ids=["twice_ready", "too_deep"],
)
async def test_a_worker_that_writes_nonsense_later_is_killed(
    monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    ready = encode(Ready(IDENTITY, 100, 1)).decode().strip()
    script = f"input(); print({ready!r}, flush=True); input(); print({again!r}, flush=True)"
    replace_worker(monkeypatch, f"{script}; input(); input()")
    worker = await process.WorkerProcess.start("phi3/fake")
    async with asyncio.timeout(10):
        await worker.load(Load("/models/phi3", EngineOptions("cpu")))
        _, inbox = worker.send(Check(request=SHORT))
        assert isinstance(await inbox.get(), Died)
        await worker.stop()


async def test_a_worker_that_is_ready_too_late_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # It answers with what it is sent second.
    replace_worker(monkeypatch, "input(); print(input(), flush=True)")
    worker = await process.WorkerProcess.start("phi3/fake")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await worker.load(Load("/models/phi3", EngineOptions("cpu")))
    ready = Ready(IDENTITY, 100, 1)
    worker._write(ready)
    async with asyncio.timeout(10):
        await worker.stop()
    assert worker.ready == ready

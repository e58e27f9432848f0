"""Adapters on servers."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.errors import (
    AdapterRejected,
    ModelUnavailable,
)
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.remote import asking
from llm_sidecar.models.remote.requests import remote_request
from tests.completions import complete
from tests.unit.remote.openai_server import (
    OpenAIServer,
    Stream,
)
from tests.unit.remote.samples import (
    ASK,
    FINE,
    SCORE,
    Make,
    answer,
)

OLD, NEW = Adapter(Path("/adapters/20260101")), Adapter(Path("/adapters/20260102"))


async def test_an_adapter_gets_a_fresh_name_each_time(make: Make) -> None:
    ok = httpx.Response(200, json="Success")
    server = OpenAIServer(ok, Stream(FINE), ok, ok, Stream(FINE), ok, ok)
    server.adapters = True
    model = make("phi3", a=server)
    await model.use_adapter(OLD)
    completion = await complete(model, ASK)
    await model.use_adapter(NEW)
    await model.use_adapter(OLD)
    (first, loaded), (_, asked), (_, newer), (_, again), (unload, body) = server.requests[:5]
    assert (first, loaded["lora_path"]) == ("/v1/load_lora_adapter", "/adapters/20260101")
    assert re.fullmatch("20260101-[0-9a-f]{8}", loaded["lora_name"])
    assert asked["model"] == loaded["lora_name"] != again["lora_name"]
    assert newer["lora_path"] == "/adapters/20260102"
    assert (completion.adapter, completion.model) == ("20260101", "phi3/m-1")
    # Requests that still run may use the one before.
    assert (unload, body) == ("/v1/unload_lora_adapter", {"lora_name": loaded["lora_name"]})
    assert model.status().adapter == OLD


async def test_no_adapter_means_the_model_itself(make: Make) -> None:
    server = OpenAIServer(httpx.Response(200), Stream(FINE))
    server.adapters = True
    model = make("phi3", a=server)
    await model.use_adapter(OLD)
    await model.use_adapter(None)
    assert (await complete(model, ASK)).adapter is None
    assert server.requests[-1][1]["model"] == "org/m-1"


async def test_an_adapter_that_one_server_refuses_is_unloaded_from_the_others(make: Make) -> None:
    ok = httpx.Response(200)
    one, two = OpenAIServer(ok, ok), OpenAIServer(answer(404))
    one.adapters = two.adapters = True
    model = make("phi3", one=one, two=two)
    with pytest.raises(AdapterRejected, match="must have the folder /adapters/20260101 under"):
        await model.use_adapter(OLD)
    assert model.status().adapter is None
    (_, loaded), unload = one.requests
    assert unload == ("/v1/unload_lora_adapter", {"lora_name": loaded["lora_name"]})
    assert [path for path, _ in two.requests] == ["/v1/load_lora_adapter"]


async def test_a_server_that_does_not_answer_in_time_is_named(make: Make) -> None:
    server = OpenAIServer(TimeoutError(), httpx.Response(200))
    server.adapters = True
    model = make("phi3", a=server)
    with pytest.raises(ModelUnavailable, match=r"^The phi3 server a did not load the adapter"):
        await model.use_adapter(OLD)
    # It may load the adapter after all.
    (_, loaded), unload = server.requests
    assert unload == ("/v1/unload_lora_adapter", {"lora_name": loaded["lora_name"]})
    assert model.status().adapter is None


async def test_an_adapter_that_could_not_be_unloaded_is_unloaded_later(make: Make) -> None:
    ok = httpx.Response(200)
    server = OpenAIServer(TimeoutError(), answer(503), ok, ok)
    server.adapters = True
    model = make("phi3", a=server)
    with pytest.raises(ModelUnavailable):
        await model.use_adapter(OLD)
    await model.use_adapter(NEW)
    (_, loaded), unload, _, again = server.requests
    assert unload == again == ("/v1/unload_lora_adapter", {"lora_name": loaded["lora_name"]})


async def test_after_an_outage_a_server_has_each_adapter_once(make: Make) -> None:
    ok = httpx.Response(200)
    server = OpenAIServer(ok, Stream(FINE), ok, ok, Stream(FINE))
    server.adapters = True
    model = make("phi3", a=server)
    await model.use_adapter(OLD)
    (_, first), server.listed_adapters = server.requests[0], ["20260101-00000000"]
    await complete(model, ASK)
    server.away = httpx.ConnectError("refused")
    with pytest.raises(ModelUnavailable):
        await complete(model, ASK)
    server.away = None
    assert (await complete(model, ASK)).adapter == "20260101"
    unload, (load, second), (_, asked) = server.requests[2:]
    assert unload == ("/v1/unload_lora_adapter", {"lora_name": first["lora_name"]})
    assert load == "/v1/load_lora_adapter"
    assert first["lora_name"] != second["lora_name"] == asked["model"]


async def test_a_server_that_has_restarted_has_no_adapter_to_unload(make: Make) -> None:
    ok = httpx.Response(200)
    server = OpenAIServer(ok, answer(404), ok, Stream(FINE), ok, ok, ok)
    server.adapters = True
    model = make("phi3", a=server)
    await model.use_adapter(OLD)
    server.away = httpx.ConnectError("refused")
    with pytest.raises(ModelUnavailable):
        await complete(model, ASK)
    server.away = None
    await complete(model, ASK)
    await model.use_adapter(NEW)
    await model.use_adapter(OLD)
    unloaded = [body for path, body in server.requests if path == "/v1/unload_lora_adapter"]
    loaded = [body for path, body in server.requests if path == "/v1/load_lora_adapter"]
    assert unloaded == [{"lora_name": body["lora_name"]} for body in loaded[:2]]


async def test_a_server_without_adapters_says_so(make: Make) -> None:
    with pytest.raises(AdapterRejected, match=r"^The phi3 server a loads no adapters; "):
        await make("phi3", a=OpenAIServer()).use_adapter(OLD)


async def test_a_server_that_is_away_loads_no_adapter(make: Make) -> None:
    server = OpenAIServer()
    server.away = httpx.ConnectError("refused")
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        await make("phi3", a=server).use_adapter(OLD)


async def test_an_answer_is_recorded_with_the_adapter_that_was_asked(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    translating, swapped = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def translate(*args: Any) -> Any:
        loop.call_soon_threadsafe(translating.set)
        assert swapped.wait(10)
        return remote_request(*args)

    monkeypatch.setattr(asking, "remote_request", translate)
    ok = httpx.Response(200)
    server = OpenAIServer(ok, ok, Stream(FINE))
    server.adapters = True
    model = make("phi3", a=server)
    await model.use_adapter(OLD)
    completing = asyncio.create_task(complete(model, ASK))
    await translating.wait()
    await model.use_adapter(NEW)
    swapped.set()
    assert (await completing).adapter == "20260101"
    assert server.requests[2][1]["model"] == server.requests[0][1]["lora_name"]


async def test_all_requests_of_a_score_ask_the_same_adapter(make: Make) -> None:
    class Swapping(OpenAIServer):
        async def __call__(self, request: httpx.Request) -> httpx.Response:
            response = await super().__call__(request)
            if request.url.path == "/v1/chat/completions" and response.status_code == 400:
                await model.use_adapter(NEW)
            return response

    ok = httpx.Response(200)
    said = httpx.Response(200, json={"choices": [{"message": {"content": "7"}}]})
    server = Swapping(ok, answer(400), ok, said)
    server.adapters = True
    model = make("phi3", a=server)
    await model.use_adapter(OLD)
    scores = await model.score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    assert scores.adapter == "20260101"
    (_, loaded), (_, first), _, (_, second) = server.requests
    assert first["model"] == second["model"] == loaded["lora_name"]


# Several servers


class LoadingServer(OpenAIServer):
    """Calls `before_load` before it loads an adapter."""

    async def before_load(self) -> None:
        raise NotImplementedError

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/load_lora_adapter" and request.content != b"{}":
            await self.before_load()
        return await super().__call__(request)


async def test_all_servers_load_an_adapter_at_once(make: Make) -> None:
    barrier = asyncio.Barrier(2)

    class Waiting(LoadingServer):
        async def before_load(self) -> None:
            await barrier.wait()

    one, two = Waiting(httpx.Response(200)), Waiting(httpx.Response(200))
    one.adapters = two.adapters = True
    model = make("phi3", one=one, two=two)
    async with asyncio.timeout(5):
        await model.use_adapter(OLD)
    assert model.status().adapter == OLD


async def test_a_server_that_restarts_during_a_swap_loads_the_adapter_again(make: Make) -> None:
    class Restarting(LoadingServer):
        async def before_load(self) -> None:
            (first, _) = model._pool.servers
            one.away = httpx.ConnectError("refused")
            await first.check()
            one.away = None
            await first.contact(lambda: None)

    ok = httpx.Response(200)
    one, two = OpenAIServer(ok, ok, ok, Stream(FINE)), Restarting(ok)
    one.adapters = two.adapters = True
    model = make("phi3", one=one, two=two)
    await model.use_adapter(OLD)
    await complete(model, ASK)
    (_, lost), unload, (_, loaded), (_, asked) = one.requests
    assert unload == ("/v1/unload_lora_adapter", {"lora_name": lost["lora_name"]})
    assert asked["model"] == loaded["lora_name"] != lost["lora_name"]

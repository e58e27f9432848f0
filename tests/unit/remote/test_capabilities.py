"""The capabilities of servers, from their answers."""

from __future__ import annotations

import pytest

from llm_sidecar.errors import (
    ModelUnavailable,
)
from llm_sidecar.models.base import ServerStatus
from tests.completions import complete
from tests.unit.remote.openai_server import (
    OpenAIServer,
    Stream,
)
from tests.unit.remote.samples import (
    ASK,
    FINE,
    Make,
    server_of,
)


async def test_health_shows_what_a_server_can_do(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    server.top_logprobs, server.decisions, server.adapters = 5, True, True
    model = make(a=server)
    assert server_of(model).state == "away"
    assert model.status().not_ready == "The hermes server a is being probed for its capabilities."
    await complete(model, ASK)
    assert server_of(model) == ServerStatus(
        url="http://a/v1",
        state="ready",
        reason=None,
        model="org/m-1",
        outstanding=0,
        schema="regex",
        scores="decisions",
        top_logprobs=5,
        adapters=True,
    )
    status = model.status()
    assert (status.state, status.not_ready, status.device) == ("ready", None, None)
    assert (status.model, status.runtime) == ("hermes/m-1", "remote")


async def test_a_server_is_probed_once(make: Make) -> None:
    server = OpenAIServer(Stream(FINE), Stream(FINE))
    model = make(a=server)
    await complete(model, ASK)
    probes = server.probes
    await complete(model, ASK)
    assert server.probes == probes == 8


async def test_a_server_without_any_capability_is_recognised(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    server.schema_formats, server.top_logprobs = set(), 0
    model = make(a=server)
    await complete(model, ASK)
    found = server_of(model)
    assert (found.schema, found.scores, found.top_logprobs, found.adapters) == (
        "prompt",
        "text",
        0,
        False,
    )


@pytest.mark.parametrize(
    ("name", "configured", "listed", "chosen"),
    [
        ("hermes", None, ["only"], "only"),
        ("hermes", None, ["phi3", "hermes"], "hermes"),
        ("phi3", None, ["phi3", "hermes"], "phi3"),
        ("hermes", "x", ["a", "b"], "x"),
        ("hermes", "x", [], "x"),
    ],
)
async def test_the_model_is_the_configured_one_or_the_only_one(
    make: Make, name: str, configured: str | None, listed: list[str], chosen: str
) -> None:
    server = OpenAIServer(Stream(FINE))
    server.models = listed
    await complete(make(name, a=server, options={"model": configured}), ASK)
    ((_, body),) = server.requests
    assert body["model"] == chosen


async def test_a_server_need_not_list_its_models_if_the_settings_name_one(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    server.models = None
    with pytest.raises(ModelUnavailable, match="status 500"):
        await complete(make(a=server), ASK)
    completion = await complete(make(a=server, options={"model": "/srv/my model/"}), ASK)
    assert completion.model == "hermes/my%20model"


async def test_several_models_need_a_choice(make: Make) -> None:
    server = OpenAIServer()
    server.models = ["a", "b"]
    model = make(a=server)
    with pytest.raises(ModelUnavailable) as caught:
        await complete(model, ASK)
    assert caught.value.detail == (
        "The hermes server lists 2 models; set HERMES_REMOTE_MODEL to one."
    )
    assert model.status().state == "failed"
    assert model.status().not_ready == caught.value.detail


async def test_a_server_may_list_very_many_models(make: Make) -> None:
    server = OpenAIServer()
    server.models = [f"m-{number}" for number in range(50_000)]
    with pytest.raises(ModelUnavailable, match="The hermes server lists 50000 models"):
        await complete(make(a=server), ASK)


async def test_the_name_of_a_model_is_bounded(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    server.models = ["m" * 1024]
    assert (await complete(make(a=server), ASK)).text == "Fine."
    server.models = ["m" * 1025]
    with pytest.raises(ModelUnavailable, match="answers /models with something other than models"):
        await complete(make(a=server), ASK)


async def test_a_server_is_not_asked_for_more_log_probabilities_than_openai_allows(
    make: Make,
) -> None:
    server = OpenAIServer(Stream(FINE))
    server.top_logprobs = server.least_logprobs = 30
    model = make(a=server)
    await complete(model, ASK)
    assert server_of(model).top_logprobs == 20

"""pydantic-ai against the sidecar, over chat completions and over responses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.sidecar import KEY, PROMPT, Position

SETTINGS = {"temperature": 0.0, "max_tokens": 96}


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest, url: str) -> Any:
    return request.param("hermes", provider=OpenAIProvider(base_url=url, api_key=KEY))


async def test_an_agent_answers_with_text_and_usage(model: Any) -> None:
    result = await Agent(model, model_settings=SETTINGS).run(PROMPT)
    assert result.output
    assert result.usage.output_tokens >= 1


async def test_a_stream_has_the_text_of_the_plain_answer(model: Any) -> None:
    agent = Agent(model, model_settings=SETTINGS)
    plain = await agent.run(PROMPT)
    async with agent.run_stream(PROMPT) as stream:
        parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(parts) == plain.output


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput], ids=["tool", "native"])
async def test_an_agent_answers_with_the_clients_type(model: Any, kind: Any) -> None:
    agent = Agent(model, output_type=kind(Position), model_settings=SETTINGS, retries=0)
    result = await agent.run(PROMPT)
    assert isinstance(result.output, Position)


async def test_an_error_has_the_status_and_the_message(url: str) -> None:
    provider = OpenAIProvider(base_url=url, api_key=KEY)
    with pytest.raises(ModelHTTPError) as caught:
        await Agent(OpenAIChatModel("gpt-5", provider=provider)).run(PROMPT)
    assert caught.value.status_code == 404
    assert caught.value.body["code"] == "model_not_found"

"""langchain-openai against the sidecar."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.sidecar import KEY, PROMPT, Position


def model(url: str, **fields: Any) -> ChatOpenAI:
    given = {"model": "hermes", "temperature": 0, "max_tokens": 96, "max_retries": 0}
    return ChatOpenAI(base_url=url, api_key=KEY, **{**given, **fields})


def test_a_chat_has_text_and_usage(url: str) -> None:
    answer = model(url).invoke(PROMPT)
    assert answer.text
    assert answer.usage_metadata["output_tokens"] >= 1
    assert answer.response_metadata["finish_reason"] == "stop"


def test_a_stream_has_the_text_and_the_usage_of_the_plain_answer(url: str) -> None:
    plain = model(url).invoke(PROMPT)
    chunks = list(model(url, stream_usage=True).stream(PROMPT))
    assert "".join(chunk.text for chunk in chunks) == plain.text
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata == plain.usage_metadata


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_has_the_clients_type(url: str, method: Any) -> None:
    answer = model(url).with_structured_output(Position, method=method).invoke(PROMPT)
    assert isinstance(answer, Position)


def test_responses_have_the_text_of_the_chat(url: str) -> None:
    assert model(url, use_responses_api=True).invoke(PROMPT).text == model(url).invoke(PROMPT).text


def test_log_probabilities_arrive(url: str) -> None:
    answer = model(url, max_tokens=4).bind(logprobs=True, top_logprobs=2).invoke(PROMPT)
    given = answer.response_metadata["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in given] == [2] * len(given)


def test_a_completion_continues_the_prompt(url: str) -> None:
    llm = OpenAI(base_url=url, api_key=KEY, model="hermes", max_tokens=4, temperature=0)
    assert llm.invoke("Long AAPL")


def test_an_unknown_model_is_not_found(url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        model(url, model="gpt-5").invoke(PROMPT)

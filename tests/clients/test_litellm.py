"""LiteLLM against the sidecar, as an OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

from tests.clients.sidecar import KEY, MESSAGES, PROMPT, Position


def ask(url: str, **fields: Any) -> Any:
    given = {
        "model": "openai/hermes",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 24,
        "api_base": url,
        "api_key": KEY,
        "num_retries": 0,
    }
    return litellm.completion(**{**given, **fields})


def test_a_chat_and_its_stream_have_the_same_text_and_usage(url: str) -> None:
    plain = ask(url)
    chunks = list(ask(url, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert plain.choices[0].message.content
    assert whole.choices[0].message.content == plain.choices[0].message.content
    assert whole.usage.total_tokens == plain.usage.total_tokens


async def test_an_asynchronous_chat_has_the_same_text(url: str) -> None:
    answer = await litellm.acompletion(
        model="openai/hermes",
        messages=MESSAGES,
        temperature=0,
        max_tokens=24,
        api_base=url,
        api_key=KEY,
    )
    assert answer.choices[0].message.content == ask(url).choices[0].message.content


def test_an_answer_follows_the_clients_type(url: str) -> None:
    answer = ask(url, response_format=Position, max_tokens=64)
    Position.model_validate_json(answer.choices[0].message.content)


def test_a_forced_tool_is_called(url: str) -> None:
    tool = {
        "type": "function",
        "function": {"name": "buy", "parameters": Position.model_json_schema()},
    }
    answer = ask(url, tools=[tool], tool_choice="required", max_tokens=96)
    (call,) = answer.choices[0].message.tool_calls
    Position.model_validate_json(call.function.arguments)


def test_a_text_completion_continues_the_prompt(url: str) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/hermes",
        prompt="Long AAPL",
        max_tokens=4,
        temperature=0,
        api_base=url,
        api_key=KEY,
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 4


def test_a_response_has_the_text_of_the_chat(url: str) -> None:
    response = litellm.responses(
        model="openai/hermes",
        input=PROMPT,
        temperature=0,
        max_output_tokens=24,
        api_base=url,
        api_key=KEY,
    )
    (message,) = response.output
    assert message.content[0].text == ask(url).choices[0].message.content


def test_speech_is_wav(url: str) -> None:
    speech = litellm.speech(
        model="openai/tts-1",
        input="Long Apple.",
        voice="alloy",
        response_format="wav",
        api_base=url,
        api_key=KEY,
    )
    assert speech.content[:4] == b"RIFF"


def test_errors_become_litellms_own(url: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="no such model"):
        ask(url, model="openai/no-such-model")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(url, temperature=3)
    with pytest.raises(litellm.AuthenticationError):
        ask(url, api_key="a-wrong-key-0123456789")

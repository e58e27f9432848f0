"""The `openai` package, versions 2 and 3, against the sidecar."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Final

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic_core import from_json

from tests.clients.sidecar import KEY, MESSAGES, PROMPT, Position
from tests.live_server import LiveServer

GREEDY: Final[dict[str, Any]] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}
BUY: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "buy",
        "description": "Buys shares.",
        "parameters": Position.model_json_schema(),
    },
}


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60.0)


def counts(answer: Any) -> tuple[int, int]:
    """The numbers of prompt and completion tokens; the number of cached tokens may differ."""
    return answer.usage.prompt_tokens, answer.usage.completion_tokens


def chat(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "hermes", **GREEDY, **fields})


# Models


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    listed = client.models.list().data
    assert {"phi3", "hermes"} <= {model.id for model in listed}
    assert {model.object for model in listed} == {"model"}
    assert client.models.retrieve("hermes") == next(each for each in listed if each.id == "hermes")


# Chat completions


def test_a_chat_has_the_text_and_the_counts_of_its_tokens(client: OpenAI) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.refusal) == (0, "assistant", None)
    assert choice.message.content
    assert choice.logprobs is None
    assert 1 <= answer.usage.completion_tokens <= 24
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == 24 else "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert chat(client).choices == answer.choices


def test_phi3_writes_a_proposal_without_a_response_format(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="phi3", messages=MESSAGES, temperature=0)
    proposal = json.loads(answer.choices[0].message.content)
    assert proposal["ticker"] == "AAPL"
    assert {"action", "confidence", "rationale"} <= proposal.keys()
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("model", ["hermes", "phi3"])
def test_parse_returns_the_clients_own_type(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Position, max_tokens=64
    )
    assert isinstance(answer.choices[0].message.parsed, Position)


def test_a_json_object_is_an_object(client: OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=400)
    (choice,) = answer.choices
    # The maximum number of tokens may cut it, depending on the weights.
    is_cut = choice.finish_reason == "length"
    assert isinstance(from_json(choice.message.content, allow_partial=is_cut), dict)


def test_a_stream_has_the_text_of_the_plain_answer_and_last_its_usage(client: OpenAI) -> None:
    plain = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert (last.choices, counts(last)) == ([], counts(plain))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [plain.choices[0].finish_reason]
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_the_clients_stream_helper_parses_the_whole_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="hermes", messages=MESSAGES, response_format=Position, max_tokens=64
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(answer.choices[0].message.parsed, Position)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "buy"}}], ids=["any", "named"]
)
def test_a_forced_tool_is_called_with_valid_arguments(client: OpenAI, choice: Any) -> None:
    answer = chat(client, tools=[BUY], tool_choice=choice, max_tokens=96)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "buy"
    Position.model_validate_json(call.function.arguments)
    chunks = chat(client, tools=[BUY], tool_choice=choice, max_tokens=96, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [each for delta in deltas for each in delta.tool_calls or []]
    assert [each.function.name for each in calls if each.function.name] == ["buy"]
    arguments = "".join(each.function.arguments or "" for each in calls)
    assert arguments == call.function.arguments


def test_the_result_of_a_tool_continues_the_chat(client: OpenAI) -> None:
    asked = chat(client, tools=[BUY], tool_choice="required", max_tokens=96).choices[0].message
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "bought"}
    answer = chat(client, messages=[*MESSAGES, asked, result], tools=[BUY], tool_choice="none")
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_each_token_has_its_log_probability_and_the_most_likely_others(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == (
        answer.choices[0].message.content
    )
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert [each.logprob for each in token.top_logprobs] == sorted(
            (each.logprob for each in token.top_logprobs), reverse=True
        )
        # Greedy decoding takes the most likely one.
        assert (token.token, token.logprob) == (
            token.top_logprobs[0].token,
            token.top_logprobs[0].logprob,
        )
        assert token.logprob <= 0


def test_several_answers_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    fields = {"n": 3, "temperature": 1.5, "seed": 7}
    texts = [choice.message.content for choice in chat(client, **fields).choices]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in chat(client, **fields).choices] == texts


def test_a_stop_text_ends_the_answer_and_is_left_out(client: OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    stop = whole[8:10]
    answer = chat(client, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


async def test_eight_chats_at_once_each_get_their_own_answer(client: OpenAI, url: str) -> None:
    prompts = [f"Long {name} from 182.40, now 191.10." for name in "ABCDEFGH"]
    alone = [chat(client, messages=[{"role": "user", "content": each}]) for each in prompts]
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as several:
        calls = (
            several.chat.completions.create(
                model="hermes",
                **{**GREEDY, "messages": [{"role": "user", "content": each}]},
            )
            for each in prompts
        )
        together = await asyncio.gather(*calls)
    assert [counts(each) for each in together] == [counts(each) for each in alone]
    assert len({each.id for each in together}) == 8


def test_closing_a_stream_ends_its_generation(client: OpenAI, server: LiveServer) -> None:
    stream = chat(client, stream=True, max_tokens=400, response_format=MANY)
    next(iter(stream))
    stream.close()
    server.wait_until(lambda: requests(server) == 0)


MANY: Final[dict[str, Any]] = {
    "type": "json_schema",
    "json_schema": {
        "name": "many",
        "schema": {
            "type": "array",
            "items": {"type": "integer", "minimum": 100, "maximum": 999},
            "minItems": 90,
            "maxItems": 90,
        },
    },
}
"""An answer of at least 360 characters."""


def requests(server: LiveServer) -> int:
    found: int = server.client.get("/health").json()["models"]["hermes"]["requests"]
    return found


# Completions


def test_a_completion_continues_each_prompt_of_a_list(client: OpenAI) -> None:
    answer = client.completions.create(
        model="hermes", prompt=["Long AAPL", "Short MSFT"], max_tokens=4, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    (first,) = client.completions.create(
        model="hermes", prompt="Long AAPL", max_tokens=4, temperature=0
    ).choices
    assert first.text == answer.choices[0].text


def test_an_echo_has_the_log_probability_of_each_token_of_the_prompt(client: OpenAI) -> None:
    answer = client.completions.create(
        model="hermes", prompt="Long AAPL from 182.40", max_tokens=1, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    assert choice.text.startswith("Long AAPL from 182.40")
    given = choice.logprobs
    assert given.token_logprobs[0] is None
    assert all(each <= 0 for each in given.token_logprobs[1:])
    assert "".join(given.tokens) == choice.text
    # One token after the prompt, even if it ends the text: evaluation harnesses drop it.
    assert len(given.tokens) == answer.usage.prompt_tokens + 1
    assert len(given.top_logprobs) == len(given.text_offset) == len(given.tokens)


def test_a_stream_of_a_completion_has_the_text_of_the_plain_one(client: OpenAI) -> None:
    fields = {"model": "hermes", "prompt": "Long AAPL", "max_tokens": 8, "temperature": 0}
    chunks = client.completions.create(**fields, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == client.completions.create(**fields).choices[0].text


# Responses


def respond(client: OpenAI, **fields: Any) -> Any:
    given = {"model": "hermes", "input": PROMPT, "temperature": 0, "max_output_tokens": 24}
    return client.responses.create(**{**given, **fields})


def test_a_response_has_the_text_of_the_chat(client: OpenAI) -> None:
    response = respond(client)
    assert response.output_text == chat(client).choices[0].message.content
    assert response.status == ("incomplete" if response.usage.output_tokens == 24 else "completed")
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_the_events_of_a_response_are_numbered_and_end_with_the_response(client: OpenAI) -> None:
    plain = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = "response.output_text.delta"
    assert [kind for kind in kinds if kind != deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{plain.status}",
    ]
    text = "".join(event.delta for event in events if event.type == deltas)
    assert text == plain.output_text
    assert events[-1].response.output_text == text
    assert events[-1].response.usage.total_tokens == plain.usage.total_tokens


def test_a_response_is_parsed_to_the_clients_own_type(client: OpenAI) -> None:
    response = client.responses.parse(
        model="hermes", input=PROMPT, text_format=Position, max_output_tokens=64
    )
    assert isinstance(response.output_parsed, Position)


def test_the_clients_stream_helper_parses_the_whole_response(client: OpenAI) -> None:
    with client.responses.stream(
        model="hermes", input=PROMPT, text_format=Position, max_output_tokens=64
    ) as stream:
        for _ in stream:
            pass
        response = stream.get_final_response()
    assert isinstance(response.output_parsed, Position)


def test_a_response_calls_a_forced_tool_and_takes_its_result(client: OpenAI) -> None:
    tool = {"type": "function", **BUY["function"], "strict": None}
    response = respond(client, tools=[tool], tool_choice="required", max_output_tokens=96)
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "buy")
    Position.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "bought"}
    turns = [{"role": "user", "content": PROMPT}, call, result]
    assert respond(client, input=turns, tools=[tool], tool_choice="none").output_text


# Speech


def test_speech_is_wav_and_pcm(client: OpenAI) -> None:
    def speak(**fields: Any) -> bytes:
        text = {"model": "tts-1", "voice": "alloy", "input": "Long Apple."}
        audio: bytes = client.audio.speech.create(**text, **fields).content
        return audio

    wav = speak(response_format="wav")
    assert (wav[:4], wav[8:12]) == (b"RIFF", b"WAVE")
    assert speak()[:4] == b"RIFF"
    pcm = speak(response_format="pcm")
    assert len(pcm) % 2 == 0
    assert pcm[:4] != b"RIFF"


def test_speech_can_be_read_while_it_streams(client: OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input="Long Apple.", response_format="wav"
    ) as response:
        assert b"".join(response.iter_bytes())[:4] == b"RIFF"


# Errors


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-5")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_an_adapter_that_is_not_in_use_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/adapters/swap"):
        chat(client, model="phi3:20260101")


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        OpenAI(base_url=url, api_key="a-wrong-key-0123456789", max_retries=0).models.list()
    assert caught.value.body["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"tools": [BUY], "tool_choice": {"type": "custom"}}, "tool_choice"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_field_is_a_bad_request_that_names_it(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert re.split(r"[.\[]", caught.value.param)[0] == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body["message"]


def test_an_unsupported_keyword_of_a_schema_is_named(client: OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        chat(client, response_format=form)


def test_a_prompt_that_does_not_fit_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "word " * 6000}])
    assert caught.value.code == "context_length_exceeded"


def test_a_body_that_is_too_large_is_an_error_with_a_message(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, messages=[{"role": "user", "content": "x" * (2 << 20)}])
    assert caught.value.status_code == 413
    assert caught.value.body["message"]


def test_an_unsupported_audio_format_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(
            model="tts-1", voice="alloy", input="Long Apple.", response_format="mp3"
        )
    assert caught.value.param == "response_format"


def test_a_path_that_does_not_exist_is_an_error_with_a_message(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="hermes", input="x")
    assert caught.value.body["message"]

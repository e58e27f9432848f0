"""The requests of a remote model to its server, and how it reads the answers."""

from __future__ import annotations

import json
import logging
import re
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from llm_sidecar import proposals
from llm_sidecar.engines.base import TokenLogprob
from llm_sidecar.engines.outputs import LEAST_LOGPROB
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models.base import GenerationRequest
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.services.client_schemas import guidance_of
from llm_sidecar.telemetry.trace_context import traceparent
from tests.completions import complete
from tests.unit.remote.openai_server import (
    OpenAIServer,
    Stream,
    chunk,
    events,
    transport,
    usage,
)
from tests.unit.remote.samples import (
    ASK,
    CHAT,
    FINE,
    PROPOSAL,
    PROPOSE,
    Make,
    answer,
    server_of,
)


async def test_an_answer_is_streamed_with_the_counts_of_the_server(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    model = make(a=server)
    async with aclosing(model.stream(ASK)) as stream:
        deltas = [delta async for delta in stream]
    assert [delta.text for delta in deltas] == ["Fi", "ne.", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, "stop"]
    assert {delta.model for delta in deltas} == {"hermes/m-1"}
    assert [delta.completion_tokens for delta in deltas] == [1, 2, 3]
    assert deltas[-1].prompt_tokens == 11
    assert deltas[-1].identity is not None
    assert deltas[-1].identity.runtime == "remote"
    body = {
        "model": "org/m-1",
        "messages": CHAT,
        "max_tokens": 40,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
    }
    assert server.requests == [("/v1/chat/completions", body)]
    assert model.status().completion_tokens_total == 3


async def test_the_server_chooses_the_sampling_that_a_request_leaves_out(make: Make) -> None:
    server = OpenAIServer(Stream(FINE), Stream(FINE))
    model = make(a=server)
    await complete(model, replace(ASK, temperature=None))
    await complete(model, replace(ASK, temperature=0.5, top_p=0.9, seed=(1 << 31) + 5))
    first, second = (body for _, body in server.requests)
    assert first.keys().isdisjoint({"temperature", "top_p", "seed"})
    assert (second["temperature"], second["top_p"], second["seed"]) == (0.5, 0.9, 5)


TOO_LONG = {"error": {"code": "context_length_exceeded"}}


async def test_a_client_that_sets_no_limit_gets_what_the_context_leaves(make: Make) -> None:
    server = OpenAIServer(answer(400, TOO_LONG), Stream(FINE))
    assert (await complete(make(a=server), replace(ASK, fit_context=True))).text == "Fine."
    (_, first), (_, second) = server.requests
    assert first == second | {"max_tokens": 40}
    assert "max_tokens" not in second


@pytest.mark.parametrize(
    ("fit_context", "refusals"),
    [
        # The limit of the client is not changed.
        (False, [answer(400, TOO_LONG)]),
        # The prompt alone is too long.
        (True, [answer(400, TOO_LONG)] * 2),
        # Something else is wrong.
        (True, [answer(400)]),
    ],
)
async def test_no_other_refused_request_is_sent_again(
    make: Make, *, fit_context: bool, refusals: list[httpx.Response]
) -> None:
    server = OpenAIServer(*refusals)
    with pytest.raises(InvalidRequest):
        await complete(make(a=server), replace(ASK, fit_context=fit_context))
    assert server.answers == []


async def test_a_raw_prompt_goes_to_completions(make: Make) -> None:
    text = events({"choices": [{"text": "Fine", "finish_reason": "length"}]}, usage(1, 1))
    server = OpenAIServer(Stream(text), Stream(text))
    model = make(a=server)
    completion = await complete(model, GenerationRequest([], 4, text="Once"))
    assert (completion.text, completion.finish_reason) == ("Fine", "length")
    await complete(model, GenerationRequest([], 4, tokens=[5, 6]))
    prompts = [(path, body["prompt"]) for path, body in server.requests]
    assert prompts == [("/v1/completions", "Once"), ("/v1/completions", [5, 6])]


async def test_the_key_and_the_trace_are_sent_and_the_key_is_not_shown(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = OpenAIServer(Stream(FINE))
    model = make(a=server, options={"key": SecretStr("sk-secret")})
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    token = traceparent.set(trace)
    await complete(model, ASK)
    traceparent.reset(token)
    assert server.headers["authorization"] == "Bearer sk-secret"
    assert server.headers["traceparent"] == trace
    assert "sk-secret" not in caplog.text + repr(model.status())


async def test_credentials_in_a_url_are_sent_and_not_shown() -> None:
    server = OpenAIServer(Stream(FINE))
    url = SecretStr("http://desk:pass%21word@a/v1")
    model = RemoteModel("hermes", [url], transport=transport(a=server))
    await complete(model, ASK)
    assert httpx.BasicAuth("desk", "pass!word")._auth_header == server.headers["authorization"]
    assert server_of(model).url == "http://a/v1"
    assert "pass" not in repr(model.status())
    await model.close()


async def test_a_url_without_a_path_means_v1() -> None:
    server = OpenAIServer(Stream(FINE))
    model = RemoteModel("hermes", [SecretStr("http://a")], transport=transport(a=server))
    assert (await complete(model, ASK)).text == "Fine."
    await model.close()


@pytest.mark.parametrize(
    "text",
    [
        [chunk(None), chunk("Fine."), chunk("", "stop")],
        [chunk([{"type": "text", "text": "Fi"}, {"text": "ne."}]), chunk(finish="stop")],
        [chunk("Fine.", "tool_calls", usage={"prompt_tokens": "11"})],
        [{"choices": [{"delta": {"reasoning_content": "Hm."}}]}, chunk("Fine.", "eos")],
        [chunk("Fine.")],
        [chunk("Fine.", ["stop"])],  # type: ignore[arg-type]
        [chunk("Fine.", "stop", usage=None), {"choices": []}],
        [chunk("Fine.", logprobs=7), chunk("", "stop", usage={"completion_tokens": None})],
    ],
)
async def test_other_spellings_of_servers_are_understood(make: Make, text: list[Any]) -> None:
    completion = await complete(make(a=OpenAIServer(Stream(events(*text)))), ASK)
    assert (completion.text, completion.finish_reason) == ("Fine.", "stop")
    assert (completion.prompt_tokens, completion.completion_tokens) == (0, 1)


async def test_control_characters_do_not_enter_the_text(make: Make) -> None:
    text = events(chunk("\0Fi\x1b[31m"), chunk([{"text": "ne.\x9b\n"}], "stop"))
    completion = await complete(make(a=OpenAIServer(Stream(text))), ASK)
    assert completion.text == "\ufffdFi\ufffd[31mne.\ufffd\n"


async def test_events_may_be_cut_anywhere(make: Make) -> None:
    whole = b"".join([b": keep-alive\r\n\r\n", b"event: x\r\n", *FINE])
    pieces = [whole[at : at + 3] for at in range(0, len(whole), 3)]
    assert (await complete(make(a=OpenAIServer(Stream(pieces))), ASK)).text == "Fine."


async def test_what_follows_the_end_is_not_text(make: Make) -> None:
    text = events(chunk("Fine.", "length"), chunk(" And more"), usage(2, 2))
    completion = await complete(make(a=OpenAIServer(Stream(text))), ASK)
    assert (completion.text, completion.finish_reason) == ("Fine.", "length")


async def test_log_probabilities_come_with_the_text(make: Make) -> None:
    other = {"token": "No", "logprob": -2.0, "bytes": [78, 111]}
    entry = {"token": "Fine", "id": 9, "logprob": -0.25, "top_logprobs": [other]}
    choice = {"delta": {"content": "Fine"}, "logprobs": {"content": [entry]}}
    server = OpenAIServer(Stream(events({"choices": [choice]}, chunk("", "stop"))))
    server.top_logprobs = 5
    completion = await complete(make(a=server), replace(ASK, logprobs=12))
    top = (TokenLogprob(-1, b"No", -2.0),)
    assert completion.logprobs == (TokenLogprob(9, b"Fine", -0.25, top),)
    ((_, body),) = server.requests
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)


async def test_log_probabilities_of_completions_are_lists(make: Make) -> None:
    found = {"tokens": ["a", "b"], "token_logprobs": [-1.0, None], "top_logprobs": [{"c": -2.0}]}
    choice = {"text": "ab", "logprobs": found, "finish_reason": "stop"}
    server = OpenAIServer(Stream(events({"choices": [choice]})))
    completion = await complete(make(a=server), GenerationRequest([], 4, text="x", logprobs=1))
    first, second = completion.logprobs
    assert first == TokenLogprob(-1, b"a", -1.0, (TokenLogprob(-1, b"c", -2.0),))
    assert second == TokenLogprob(-1, b"b", -9999.0)


async def test_what_a_server_cannot_do_is_refused(make: Make) -> None:
    server = OpenAIServer()
    server.top_logprobs = 0
    server.schema_formats = set()
    model = make(a=server)
    with pytest.raises(InvalidRequest, match=r"^logprobs: the server"):
        await complete(model, replace(ASK, logprobs=2))
    for changes in ({"prompt_logprobs": 2}, {"echo": True}, {"max_tokens": 0}):
        with pytest.raises(InvalidRequest, match=r"^echo: "):
            await complete(model, replace(ASK, **changes))
    with pytest.raises(InvalidRequest, match=r"^schema: the server"):
        await complete(model, replace(ASK, guidance='{"type": "array"}'))
    assert server.requests == []


# Schemas


@pytest.mark.parametrize(("max_tokens", "longest"), [(96, 22), (128, 52), (248, 109)])
async def test_a_regular_expression_is_the_first_choice(
    make: Make, max_tokens: int, longest: int
) -> None:
    server = OpenAIServer(Stream(FINE))
    await complete(make(a=server), replace(PROPOSE, guidance=proposals.guidance(max_tokens)))
    ((_, body),) = server.requests
    assert body["structured_outputs"]["regex"] == body["regex"]
    assert "response_format" not in body
    expression = re.compile(body["regex"])
    assert expression.fullmatch(proposals.dumps(PROPOSAL))
    assert not expression.fullmatch(json.dumps(PROPOSAL))
    # The budget bounds the rationale.
    for characters, matches in ((longest, True), (longest + 1, False)):
        long = proposals.dumps(PROPOSAL | {"rationale": "A" * (characters - 1) + "."})
        assert bool(expression.fullmatch(long)) is matches


async def test_a_grammar_is_the_second_choice(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    server.schema_formats = {"grammar", "json_schema"}
    await complete(make(a=server), PROPOSE)
    ((_, body),) = server.requests
    assert body["grammar"].startswith("root ::= ")
    assert body.keys().isdisjoint({"response_format", "regex"})


async def test_a_json_schema_is_the_third_choice(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    server.schema_formats = {"json_schema"}
    await complete(make(a=server), PROPOSE)
    ((_, body),) = server.requests
    schema = json.loads(proposals.GUIDANCE)
    del schema["x-guidance"]
    assert body["response_format"] == {
        "type": "json_schema",
        # OpenAI refuses a strict schema with an optional property.
        "json_schema": {"name": "answer", "schema": schema},
    }


async def test_a_clients_schema_is_sent_as_it_is(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    schema = {"type": "object", "properties": {"pattern": {"type": "array"}}}
    await complete(make(a=server), replace(ASK, guidance=json.dumps(schema)))
    ((_, body),) = server.requests
    assert body["response_format"]["json_schema"]["schema"] == schema


ORDER = {"type": "object", "properties": {"side": {"enum": ["buy", "sell"]}}, "required": ["side"]}
CHECKED = replace(ASK, guidance=guidance_of(ORDER), check_answer=True)


def written(text: str, finish: str = "stop") -> Stream:
    return Stream(events(chunk(text), chunk("", finish), usage(11, 3)))


@pytest.mark.parametrize(
    "schema_formats", [set(), {"json_schema"}, {"regex", "grammar", "json_schema"}]
)
async def test_an_unsupported_keyword_is_refused_and_named_before_the_server_is_asked(
    make: Make, schema_formats: set[str]
) -> None:
    server = OpenAIServer()
    server.schema_formats = schema_formats
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="uniqueItems is not supported"):
        await complete(make(a=server), replace(CHECKED, guidance=guidance_of(schema)))
    assert server.requests == []


@pytest.mark.parametrize(
    ("schema_formats", "field"),
    [
        ({"regex", "grammar", "json_schema"}, "regex"),
        ({"grammar", "json_schema"}, "grammar"),
        ({"json_schema"}, "response_format"),
        (set(), None),
    ],
)
async def test_an_answer_that_follows_its_schema_is_returned(
    make: Make, schema_formats: set[str], field: str | None
) -> None:
    server = OpenAIServer(written('{ "side": "buy" }'))
    server.schema_formats = schema_formats
    completion = await complete(make(a=server), CHECKED)
    assert (completion.text, completion.finish_reason) == ('{ "side": "buy" }', "stop")
    ((_, body),) = server.requests
    guides = body.keys() & {"regex", "grammar", "response_format"}
    assert guides == (set() if field is None else {field})


@pytest.mark.parametrize("text", ['{"side":"hold"}', '{"side":"buy","note":1}', "Certainly.", "{"])
async def test_an_answer_that_breaks_its_schema_fails_before_its_end(make: Make, text: str) -> None:
    server = OpenAIServer(written(text))
    server.schema_formats = {"json_schema"}
    async with aclosing(make(a=server).stream(CHECKED)) as stream:
        assert (await anext(stream)).text == text
        with pytest.raises(ModelUnavailable, match="does not follow its JSON schema") as error:
            await anext(stream)
    assert text not in str(error.value)


async def test_a_truncated_answer_need_not_follow_its_schema(make: Make) -> None:
    server = OpenAIServer(written('{"side":', "length"))
    server.schema_formats = {"json_schema"}
    assert (await complete(make(a=server), CHECKED)).finish_reason == "length"


async def test_broken_answers_do_not_open_the_circuit_breaker(make: Make) -> None:
    server = OpenAIServer(*(written("Certainly.") for _ in range(4)), Stream(FINE))
    server.schema_formats = {"json_schema"}
    model = make(a=server)
    for _ in range(4):
        with pytest.raises(ModelUnavailable, match="does not follow"):
            await complete(model, CHECKED)
    assert (await complete(model, ASK)).text == "Fine."


async def test_the_prompt_is_the_last_choice_and_only_the_object_counts(make: Make) -> None:
    text = proposals.dumps(PROPOSAL | {"rationale": 'A "}" stays.'})
    stream = Stream(
        events(chunk("Sure:\n```json\n" + text[:20]), chunk(text[20:] + "\n```"), chunk("Bye"))
    )
    server = OpenAIServer(stream)
    server.schema_formats = set()
    completion = await complete(make(a=server), PROPOSE)
    assert (completion.text, completion.finish_reason) == (text, "stop")
    ((_, body),) = server.requests
    system = body["messages"][0]["content"]
    assert system.startswith(
        f"{proposals.SYSTEM_PROMPT}\n\nAnswer with one JSON object and nothing"
    )
    assert '"required":["ticker","action"' in system
    assert "pattern" not in system
    assert stream.closed


@pytest.mark.parametrize(
    "counts",
    [
        {"prompt_tokens": 1 << 31, "completion_tokens": 10**400},
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": "7", "completion_tokens": 2.5},
    ],
)
async def test_impossible_counts_are_not_counted(make: Make, counts: dict[str, Any]) -> None:
    counted = chunk(usage=counts)
    model = make(a=OpenAIServer(Stream(events(chunk("Fi"), chunk("ne.", "stop"), counted))))
    completion = await complete(model, ASK)
    # Two pieces of text count as two tokens.
    assert (completion.prompt_tokens, completion.completion_tokens) == (0, 2)


async def test_a_logarithm_may_be_too_large_for_a_float(make: Make) -> None:
    tokens = [{"token": "Fine.", "logprob": -(10**400), "top_logprobs": []}]
    answer = chunk("Fine.", "stop")
    answer["choices"][0]["logprobs"] = {"content": tokens}
    model = make(a=OpenAIServer(Stream(events(answer))))
    completion = await complete(model, replace(ASK, logprobs=0))
    assert [token.logprob for token in completion.logprobs] == [LEAST_LOGPROB]


async def test_further_most_likely_tokens_are_dropped(make: Make) -> None:
    tops = [{"token": str(number), "logprob": -1.0} for number in range(21)]
    found = chunk("Fine.", "stop")
    found["choices"][0]["logprobs"] = {
        "content": [{"token": "Fine.", "logprob": -1.0, "top_logprobs": tops}]
    }
    legacy = {
        "tokens": ["Fine."],
        "token_logprobs": [-1.0],
        "top_logprobs": [{str(number): -1.0 for number in range(21)}],
    }
    choice = {"text": "Fine.", "finish_reason": "stop", "logprobs": legacy}
    model = make(a=OpenAIServer(Stream(events(found)), Stream(events({"choices": [choice]}))))
    for request in (ASK, replace(ASK, messages=(), text="Hold?")):
        completion = await complete(model, replace(request, logprobs=20))
        assert [len(token.top) for token in completion.logprobs] == [20]


async def test_parts_of_parts_are_no_text(make: Make) -> None:
    nested: Any = "deep"
    for _ in range(450):
        nested = [{"text": nested}]
    model = make(a=OpenAIServer(Stream(events(chunk(nested), chunk([{"text": "Fine."}], "stop")))))
    assert (await complete(model, ASK)).text == "Fine."


async def test_only_the_first_choice_is_read(make: Make) -> None:
    other = chunk("Sell.", "length")
    other["choices"][0]["index"] = 1
    both = chunk("ne.", "stop")
    both["choices"] = [*other["choices"], *both["choices"]]
    model = make(a=OpenAIServer(Stream(events(chunk("Fi"), other, both))))
    completion = await complete(model, ASK)
    assert (completion.text, completion.finish_reason) == ("Fine.", "stop")


async def test_cookies_of_a_server_are_not_kept(make: Make) -> None:
    greeting = httpx.Response(400, headers={"Set-Cookie": "session=1; Path=/"})
    server = OpenAIServer(greeting, Stream(FINE))
    model = make(a=server)
    with pytest.raises(InvalidRequest):
        await complete(model, ASK)
    await complete(model, ASK)
    assert "cookie" not in server.headers

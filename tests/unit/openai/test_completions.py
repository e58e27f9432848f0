"""`/v1/completions` over fake models."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from llm_sidecar.models.base import Delta, GenerationRequest, TokenLogprob
from osiris.openai import logprobs
from tests.unit.fakes import FakeSidecar, completion
from tests.unit.openai.events import chunks_of

URL = "/v1/completions"
BODY: dict[str, Any] = {"model": "hermes", "prompt": "AAPL is"}
TEXT = completion(" up.", model="hermes/fake", finish_reason="length")


def token(text: str | bytes, logprob: float | None, *top: tuple[str, float]) -> TokenLogprob:
    data = text if isinstance(text, bytes) else text.encode()
    others = tuple(TokenLogprob(0, name.encode(), value) for name, value in top)
    return TokenLogprob(0, data, logprob, others)


PROMPT_TOKENS = (
    token("AA", None),
    token("PL", -0.5, ("PL", -0.5)),
    token(" is", -1.0, (" a", -0.25)),
)
NEW_TOKEN = token(" up", -2.0, (" up", -2.0))


def echoing(text: str = "") -> list[Delta]:
    """A generation of one token with the log probabilities of its prompt, and with its text."""
    return [
        Delta(
            "",
            "hermes/fake",
            prompt_tokens=3,
            prompt_logprobs=PROMPT_TOKENS,
            prompt_text=text,
        ),
        Delta(
            " up",
            "hermes/fake",
            prompt_tokens=3,
            completion_tokens=1,
            finish_reason="length",
            logprobs=(NEW_TOKEN,),
        ),
    ]


async def answer(asking: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await asking.post(URL, json=BODY | fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_a_text_is_continued(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [TEXT]
    body = await answer(asking)
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "hermes",
        "choices": [{"index": 0, "text": " up.", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 9,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    expected = GenerationRequest((), 16, temperature=None, text="AAPL is")
    assert fake_sidecar.hermes.requests == [expected]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_prompts_come_in_four_forms(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, prompt: Any, prompts: list[Any]
) -> None:
    fake_sidecar.hermes.answers = [TEXT] * len(prompts)
    body = await answer(asking, prompt=prompt)
    assert [choice["index"] for choice in body["choices"]] == list(range(len(prompts)))
    requests = [one for one in fake_sidecar.hermes.requests if isinstance(one, GenerationRequest)]
    assert [one.text or one.tokens for one in requests] == prompts
    assert body["usage"]["prompt_tokens"] == 7 * len(prompts)


async def test_each_prompt_has_its_choices(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [TEXT] * 4
    body = await answer(asking, prompt=["a", "b"], n=2, seed=7, max_tokens=3)
    requests = [one for one in fake_sidecar.hermes.requests if isinstance(one, GenerationRequest)]
    assert [(one.text, one.seed) for one in requests] == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    assert body["usage"]["prompt_tokens"] == 14
    assert body["usage"]["completion_tokens"] == 36


# Echo and log probabilities, as lm-eval reads them


async def test_an_echo_has_the_log_probabilities_of_the_prompt(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [echoing("AAPL is")]
    body = await answer(asking, prompt=[5, 6, 7], max_tokens=1, echo=True, logprobs=1)
    (choice,) = body["choices"]
    assert choice["text"] == "AAPL is up"
    assert choice["logprobs"] == {
        "tokens": ["AA", "PL", " is", " up"],
        "token_logprobs": [None, -0.5, -1.0, -2.0],
        "top_logprobs": [None, {"PL": -0.5}, {" a": -0.25, " is": -1.0}, {" up": -2.0}],
        "text_offset": [0, 2, 4, 7],
    }
    (request,) = fake_sidecar.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert (request.max_tokens, request.logprobs, request.prompt_logprobs) == (1, 1, 1)
    assert request.echo


async def test_offsets_are_those_of_the_text_whatever_its_tokens_spell(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    """A tokenizer like that of Llama 2 begins a prompt with BOS and a space."""
    prompt = (token("<s>", None), token(" AAPL", -0.5), token(" is", -1.0))
    first, last = echoing()
    # The completion has a control token, too.
    new = (NEW_TOKEN, token("<unk>", -3.0), token(".", -1.0))
    fake_sidecar.hermes.answers = [
        [replace(first, prompt_logprobs=prompt), replace(last, text=" up.", logprobs=new)]
    ]
    (choice,) = (await answer(asking, max_tokens=3, echo=True, logprobs=0))["choices"]
    assert choice["text"] == "AAPL is up."
    found = dict(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
    assert found == {"<s>": 0, " AAPL": 0, " is": 4, " up": 7, "<unk>": 10, ".": 10}


async def test_an_echo_alone_generates_nothing(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    prompt = replace(echoing()[0], finish_reason="length")
    fake_sidecar.hermes.answers = [[prompt]]
    body = await answer(asking, max_tokens=0, echo=True, logprobs=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("AAPL is", "length")
    assert choice["logprobs"]["tokens"] == ["AA", "PL", " is"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"PL": -0.5}, {" a": -0.25, " is": -1.0}]
    assert body["usage"]["completion_tokens"] == 0
    (request,) = fake_sidecar.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert request.max_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_of_tokens_without_log_probabilities_computes_none(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, stream: bool
) -> None:
    prompt, end = echoing("AAPL is")
    deltas = [replace(prompt, prompt_logprobs=()), replace(end, logprobs=())]
    fake_sidecar.hermes.answers = [deltas, deltas]
    body = BODY | {"prompt": [5, 6, 7], "echo": True, "n": 2, "stream": stream}
    response = await asking.post(URL, json=body)
    texts = ["", ""]
    for answered in chunks_of(response) if stream else [response.json()]:
        for choice in answered["choices"]:
            assert choice["logprobs"] is None
            texts[choice["index"]] += choice["text"]
    assert texts == ["AAPL is up"] * 2
    for request in fake_sidecar.hermes.requests:
        assert isinstance(request, GenerationRequest)
        assert (request.echo, request.logprobs, request.prompt_logprobs) == (True, None, None)


async def test_an_echo_of_a_text_is_the_text_itself(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion(" up")]
    (choice,) = (await answer(asking, echo=True))["choices"]
    assert (choice["text"], choice["logprobs"]) == ("AAPL is up", None)
    (request,) = fake_sidecar.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert (request.echo, request.prompt_logprobs) == (False, None)


async def test_an_empty_completion_still_has_its_echo(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("")]
    (choice,) = (await answer(asking, echo=True))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("AAPL is", "stop")


async def test_the_end_of_a_text_counts_as_a_token(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    """lm-eval drops the last token, which is the one that it requested."""
    deltas = echoing()
    ended = replace(deltas[1], text="", logprobs=(), finish_reason="stop")
    fake_sidecar.hermes.answers = [[deltas[0], ended]]
    (choice,) = (await answer(asking, max_tokens=1, echo=True, logprobs=1))["choices"]
    assert choice["logprobs"]["tokens"] == ["AA", "PL", " is", ""]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -1.0, None]
    assert choice["text"] == "AAPL is"


async def test_a_stop_text_is_no_token(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    tokens = (token(" up", -1.0), token(" END", -1.0))
    fake_sidecar.hermes.answers = [
        [Delta(" up END", "hermes/fake", completion_tokens=2, logprobs=tokens)]
    ]
    (choice,) = (await answer(asking, stop=" END", logprobs=0))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" up", "stop")
    assert choice["logprobs"]["tokens"] == [" up"]


async def test_half_characters_are_shown_as_bytes(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    halves = tuple(token("Ä".encode()[n : n + 1], -1.0) for n in (0, 1))
    tokens = (*halves, token("b", -1.0))
    fake_sidecar.hermes.answers = [
        [Delta("Äb", "hermes/fake", finish_reason="length", logprobs=tokens)]
    ]
    (choice,) = (await answer(asking, logprobs=0))["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\x84", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_is_measured_for_its_first_choice_only(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, stream: bool
) -> None:
    prompt, end = echoing()
    other = replace(prompt, prompt_logprobs=(token("B", None),))
    # The other choices wait for the first choice of their prompt.
    fake_sidecar.hermes.answers = [[prompt, end], [other, end], [end], [end]]
    body = BODY | {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 1, "stream": stream}
    response = await asking.post(URL, json=body)
    found: dict[int, list[str]] = {index: [] for index in range(4)}
    for answered in chunks_of(response) if stream else [response.json()]:
        for choice in answered["choices"]:
            found[choice["index"]] += choice["logprobs"]["tokens"]
    first, second = ["AA", "PL", " is", " up"], ["B", " up"]
    assert found == {0: first, 1: first, 2: second, 3: second}
    requests = [one for one in fake_sidecar.hermes.requests if isinstance(one, GenerationRequest)]
    assert sorted((one.text, one.prompt_logprobs is None) for one in requests) == [
        ("a", False),
        ("a", True),
        ("b", False),
        ("b", True),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_log_probabilities_of_all_choices_are_bounded_together(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    """Each choice has five for its prompt and two for its new token."""
    body = BODY | {"n": 2, "echo": True, "logprobs": 1, "stream": stream}
    monkeypatch.setattr(logprobs, "MAX_ENTRIES", 14)
    fake_sidecar.hermes.answers = [echoing(), echoing()[1:]]
    response = await asking.post(URL, json=body)
    assert response.status_code == 200
    assert "too many" not in response.text
    monkeypatch.setattr(logprobs, "MAX_ENTRIES", 13)
    fake_sidecar.hermes.answers = [echoing(), echoing()[1:]]
    response = await asking.post(URL, json=body)
    last = response.text.split("data: ")[-1]
    assert json.loads(last)["error"]["param"] == "logprobs"
    assert response.status_code == (200 if stream else 400)


# Streams


@pytest.mark.parametrize("stream", [False, True])
async def test_many_log_probabilities_leave_the_event_loop_alone(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    threads: list[bool] = []
    entry = logprobs.LegacyLogprobs._entry

    def noted(self: logprobs.LegacyLogprobs, one: TokenLogprob) -> dict[str, Any]:
        threads.append(threading.current_thread() is threading.main_thread())
        return entry(self, one)

    monkeypatch.setattr(logprobs.LegacyLogprobs, "_entry", noted)
    long = replace(echoing()[0], prompt_logprobs=PROMPT_TOKENS[1:2] * 1000, finish_reason="length")
    fake_sidecar.hermes.answers = [[long]]
    body = BODY | {"max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
    response = await asking.post(URL, json=body)
    assert response.text.count("PL") >= 1000
    assert threads == [False] * 1000


async def test_a_stream_begins_with_the_echo(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [echoing()]
    options = {"stream_options": {"include_usage": True}}
    body = BODY | {"echo": True, "logprobs": 1, "stream": True, **options}
    *chunks, last = chunks_of(await asking.post(URL, json=body))
    choices = [one["choices"][0] for one in chunks]
    assert [one["text"] for one in choices] == ["AAPL is", " up", ""]
    assert [one["finish_reason"] for one in choices] == [None, None, "length"]
    assert choices[1]["logprobs"]["text_offset"] == [7]
    assert [one["usage"] for one in chunks] == [None, None, None]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 17, "n": 8}, "n"),
        ({"prompt": "a" * 33_000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"presence_penalty": 1}, "presence_penalty"),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, changes: dict[str, Any], param: str
) -> None:
    response = await asking.post(URL, json=BODY | changes)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert fake_sidecar.hermes.requests == []

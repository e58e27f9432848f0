"""Log probabilities of prompts and completions, on models of random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from llm_sidecar import proposals
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import Delta, TokenLogprob, unless_failed
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.logprobs import log_softmax
from llm_sidecar.errors import InvalidRequest

PROMPT = "Long ABC from 100, now 112.5. 価格🚀"
CHAT = [{"role": "user", "content": PROMPT}]
RUNTIMES = ["onnxruntime", "pruned", "onnxruntime-genai", "transformers"]


@pytest.fixture(scope="module", params=RUNTIMES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    folders = ("random_phi3_onnx", "pruned_phi3_onnx", "serial_phi3_onnx", "random_phi3_torch")
    name = dict(zip(RUNTIMES, folders, strict=True))[request.param]
    yield load_engine(request.getfixturevalue(name), device="cpu")


def raw(**settings: Any) -> GenerationRequest:
    return replace(GenerationRequest([], 6, text=PROMPT), **settings)


def run(engine: Engine, request: GenerationRequest) -> list[Delta]:
    return list(engine.stream(request))


def read(deltas: list[Delta]) -> list[TokenLogprob]:
    """The log probabilities of the prompt."""
    return [token for delta in deltas for token in delta.prompt_logprobs]


def written(deltas: list[Delta]) -> list[TokenLogprob]:
    """The log probabilities of the completion."""
    return [token for delta in deltas for token in delta.logprobs]


def values(tokens: Iterable[TokenLogprob]) -> list[float]:
    """The log probabilities, without that of a first token."""
    return [token.logprob for token in tokens if token.logprob is not None]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def own(engine: Engine, tokens: list[int], begin: int = 1) -> list[float]:
    """The log probability of each token from `begin` on, from a prefill of those before it."""
    assert isinstance(engine, Decoder)
    found = []
    for end in range(begin, len(tokens)):
        states = engine.new_states(len(tokens))
        logits = engine.forward(tokens[:end], states)
        found.append(float(log_softmax(logits)[tokens[end]]))
    return found


def test_a_prompt_has_the_log_probabilities_of_its_own_prefixes(engine: Engine) -> None:
    tokens = engine.tokenize(raw())
    found = read(run(engine, raw(prompt_logprobs=0)))
    assert [one.id for one in found] == tokens
    assert (found[0].logprob, found[0].top) == (None, ())
    expected = own(engine, tokens)
    assert [one.logprob for one in found[1:]] == pytest.approx(expected, rel=0, abs=1e-4)
    assert b"".join(one.data for one in found) == PROMPT.encode()


def test_a_chat_has_log_probabilities_too(engine: Engine) -> None:
    chat = GenerationRequest(CHAT, 1, prompt_logprobs=0)
    found = read(run(engine, chat))
    assert [one.id for one in found] == engine.tokenize(chat)
    assert found[0].data == b"<|user|>"


def test_the_most_likely_tokens_of_a_prompt_come_with_it(engine: Engine) -> None:
    for one in read(run(engine, raw(prompt_logprobs=5)))[1:]:
        likely = values(one.top)
        assert len(likely) == 5
        assert likely == sorted(likely, reverse=True)
        assert values([one])[0] <= likely[0]


def test_a_long_prompt_has_one_log_probability_a_token(random_phi3_onnx: Path) -> None:
    engine = load_engine(random_phi3_onnx, device="cpu")
    request = raw(text="Long ABC. " * 120, prompt_logprobs=0)
    deltas = run(engine, request)
    tokens = engine.tokenize(request)
    assert len(tokens) > 600
    assert [one.id for one in read(deltas)] == tokens
    # A step of the prefill, at most.
    assert max(len(delta.prompt_logprobs) for delta in deltas) <= 257
    assert deltas[0].finish_reason is None


def test_prompt_log_probabilities_do_not_change_the_completion(engine: Engine) -> None:
    plain = text_of(run(engine, raw(max_tokens=12)))
    assert text_of(run(engine, raw(max_tokens=12, prompt_logprobs=0))) == plain


def test_no_completion_may_be_asked_for(engine: Engine) -> None:
    deltas = run(engine, raw(max_tokens=0, prompt_logprobs=1))
    assert [one.id for one in read(deltas)] == engine.tokenize(raw())
    assert (text_of(deltas), written(deltas)) == ("", [])
    last = deltas[-1]
    assert (last.finish_reason, last.completion_tokens) == ("length", 0)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_a_prompt_alone_takes_no_log_probabilities(engine: Engine) -> None:
    (last,) = [delta for delta in run(engine, raw(max_tokens=0)) if delta.finish_reason]
    assert (last.text, last.finish_reason, last.prompt_logprobs) == ("", "length", ())
    assert (last.prompt_tokens, last.completion_tokens) == (len(engine.tokenize(raw())), 0)


def test_a_completion_has_a_log_probability_for_each_token(engine: Engine) -> None:
    deltas = run(engine, raw(logprobs=3))
    found = written(deltas)
    assert deltas[-1].completion_tokens == len(found) == 6
    tokens = engine.tokenize(raw()) + [one.id for one in found]
    expected = own(engine, tokens, len(tokens) - 6)
    assert [one.logprob for one in found] == pytest.approx(expected, rel=0, abs=1e-4)
    # Greedy: each is the most likely one.
    assert [one.id for one in found] == [one.top[0].id for one in found]
    assert text_of(deltas) == text_of(run(engine, raw()))


def test_the_bytes_of_a_completion_are_its_text(engine: Engine) -> None:
    deltas = run(engine, raw(max_tokens=40, logprobs=0))
    joined = b"".join(one.data for one in written(deltas)).decode(errors="replace")
    # The text ends before the bytes of an unfinished character.
    assert joined.startswith(text_of(deltas).rstrip("\N{REPLACEMENT CHARACTER}"))


def test_log_probabilities_are_those_before_temperature_and_guidance(engine: Engine) -> None:
    guided = GenerationRequest(
        proposals.build_messages(PROMPT),
        proposals.MAX_COMPLETION_TOKENS,
        proposals.GUIDANCE,
        temperature=1.5,
        seed=3,
        logprobs=0,
    )
    deltas = run(engine, guided)
    found = written(deltas)
    proposals.parse(text_of(deltas))
    tokens = engine.tokenize(guided) + [one.id for one in found[:8]]
    expected = own(engine, tokens, len(tokens) - 8)
    assert [one.logprob for one in found[:8]] == pytest.approx(expected, rel=0, abs=1e-4)


def test_a_guided_row_with_log_probabilities_has_no_forced_tokens(engine: Engine) -> None:
    request = GenerationRequest(
        proposals.build_messages(PROMPT),
        proposals.MAX_COMPLETION_TOKENS,
        proposals.GUIDANCE,
        logprobs=0,
    )
    deltas = run(engine, request)
    proposals.parse(text_of(deltas))
    counts = [delta.completion_tokens for delta in deltas]
    assert max(np.diff([0, *counts])) == 1
    # The end of the guidance ends the text, without a token for it.
    assert deltas[-1].finish_reason == "stop"
    assert len(written(deltas)) == counts[-1]
    assert b"".join(one.data for one in written(deltas)).decode() == text_of(deltas)


@pytest.mark.parametrize("folder", ["random_phi3_onnx", "pruned_phi3_onnx", "random_phi3_torch"])
def test_rows_with_and_without_log_probabilities_share_a_batch(
    folder: str, request: pytest.FixtureRequest
) -> None:
    engine = load_engine(request.getfixturevalue(folder), device="cpu")
    requests = [
        raw(max_tokens=15),
        raw(text="Short XYZ. " * 40, logprobs=2, prompt_logprobs=2),
        GenerationRequest(CHAT, 9, temperature=0.9, seed=4, logprobs=1),
    ]
    alone = [run(engine, one) for one in requests]
    batch = engine.batch()
    found: dict[int, list[Delta]] = {number: [] for number in range(3)}
    for number, one in enumerate(requests):
        batch.add(number, one)
    while batch:
        for number, result in batch.step():
            found[number].append(unless_failed(result))
    for number, deltas in enumerate(alone):
        assert text_of(found[number]) == text_of(deltas)
        for of in (read, written):
            ids = [one.id for one in of(deltas)]
            assert [one.id for one in of(found[number])] == ids
            assert values(of(found[number])) == pytest.approx(values(of(deltas)), rel=0, abs=1e-4)


def test_log_probabilities_of_a_prompt_leave_the_cached_prefixes_alone(engine: Engine) -> None:
    chat = GenerationRequest(proposals.build_messages(PROMPT), 2)
    run(engine, chat)
    for number in range(4):
        run(engine, raw(text=f"{number} others", prompt_logprobs=0))
    last = run(engine, chat)[-1]
    assert last.cached_tokens == last.prompt_tokens - 2


def test_too_many_log_probabilities_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"^logprobs: 20 for each of"):
        engine.tokenize(raw(text="A " * 3500, prompt_logprobs=20))


# Prompts without a template


def test_a_text_is_read_without_the_template(engine: Engine, random_phi3_torch: Path) -> None:
    tokenizer = Tokenizer.from_file(str(random_phi3_torch / "tokenizer.json"))
    assert engine.tokenize(raw()) == tokenizer.encode(PROMPT, add_special_tokens=False).ids


def test_tokens_of_a_client_are_taken_as_they_are(engine: Engine) -> None:
    tokens = engine.tokenize(raw())
    ids = raw(text=None, tokens=tokens, logprobs=0)
    assert engine.tokenize(ids) == tokens
    assert text_of(run(engine, ids)) == text_of(run(engine, raw()))


@pytest.mark.parametrize("token", [-1, 1 << 20, 1 << 70])
def test_a_token_that_does_not_exist_is_refused(engine: Engine, token: int) -> None:
    message = r"^prompt: the model has no token with one of these ids$"
    with pytest.raises(InvalidRequest, match=message):
        engine.tokenize(raw(text=None, tokens=[5, token]))


@pytest.mark.parametrize("prompt", [{"text": ""}, {"text": None, "tokens": []}])
def test_an_empty_prompt_is_refused(engine: Engine, prompt: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: it is empty"):
        engine.tokenize(raw(**prompt))


def test_tokens_that_exceed_the_context_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="context of 8192"):
        engine.tokenize(raw(text=None, tokens=[5] * 8190))


def test_a_prompt_may_fill_the_context_if_no_token_follows(engine: Engine) -> None:
    full = raw(text=None, tokens=[5] * 8192, max_tokens=0)
    assert len(engine.tokenize(full)) == 8192
    with pytest.raises(InvalidRequest, match="context of 8192"):
        engine.tokenize(replace(full, max_tokens=1))


def test_the_tokens_of_a_prompt_are_its_text(engine: Engine) -> None:
    assert engine.text_of(engine.tokenize(raw())) == PROMPT
    assert engine.text_of(engine.tokenize(GenerationRequest(CHAT, 1))[:1]) == "<|user|>"


def test_one_token_is_a_prompt(engine: Engine) -> None:
    deltas = run(engine, raw(text=None, tokens=[70], prompt_logprobs=0, logprobs=0))
    assert [(one.id, one.logprob) for one in read(deltas)] == [(70, None)]
    assert len(written(deltas)) == 6


# Sampling


def test_a_request_sets_top_p(engine: Engine) -> None:
    greedy = text_of(run(engine, raw(max_tokens=10)))
    narrow = raw(max_tokens=10, temperature=1.5, seed=1, top_p=0.0)
    assert text_of(run(engine, narrow)) == greedy
    every = raw(max_tokens=10, temperature=1.5, seed=1)
    assert text_of(run(engine, replace(every, top_p=1.0))) == text_of(run(engine, every))

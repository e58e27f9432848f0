"""The parts of the engine for GGUF models that need no llama.cpp."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_sidecar import proposals
from llm_sidecar.engines import llama_cpp, llama_process, llama_server
from llm_sidecar.engines.base import Delta, GenerationRequest, Sampling, TokenLogprob
from llm_sidecar.engines.gbnf import to_gbnf
from llm_sidecar.engines.gguf_model import GgufModel, Token
from llm_sidecar.engines.gguf_tokenizer import GgufTokenizer
from llm_sidecar.engines.llama_batch import LlamaBatch
from llm_sidecar.engines.llama_capacity import Capacity
from llm_sidecar.engines.llama_completion import LlamaCompletion, sampling_fields
from llm_sidecar.engines.llama_connection import read_events
from llm_sidecar.engines.llama_cpp import context_of
from llm_sidecar.engines.llama_guidance import check_answer, guidance_fields
from llm_sidecar.engines.llama_probabilities import Probabilities
from llm_sidecar.engines.llama_server import find_program, reason_of_failure
from llm_sidecar.errors import ModelUnavailable

GIB = 1 << 30
TOKENS = {
    1: Token("<|end|>", special=True),
    2: Token("<|end|>x", special=True),
    3: Token("<tool>", special=False),
}


def model_of(folder: Path, **changes: object) -> GgufModel:
    file = folder / "m.gguf"
    file.write_bytes(bytes(1000))
    values = {
        "files": (file,),
        "architecture": "llama",
        "context_length": 131_072,
        "vocabulary": 5,
        "cache_bytes": 131_072,
        "template": "",
        "tokens": {},
        "lookalikes": {},
        "special_tokens": {},
        "bos": None,
    }
    return GgufModel(**{**values, **changes})  # type: ignore[arg-type]


# The stream


def test_events_are_read_line_by_line() -> None:
    lines = [b'data: {"content":"a"}\n', b"\n", b": ping\n", b'data: {"stop":true}\n']
    assert list(read_events([*lines, b"data: [DONE]\n"])) == [{"content": "a"}, {"stop": True}]


@pytest.mark.parametrize("line", [b'data: {"error":{"type":"bad"}}\n', b'error: {"type":"bad"}\n'])
def test_an_error_in_a_stream_has_its_type_only(line: bytes) -> None:
    line = line.replace(b'"bad"', b'"bad","message":"Sell everything"')
    with pytest.raises(ModelUnavailable) as raised:
        list(read_events([b'data: {"content":"a"}\n', line]))
    assert raised.value.detail == "llama.cpp answers with an error: bad"


class ScriptedConnection:
    """Gives scripted answers, and keeps the bodies of the requests."""

    def __init__(self, *answers: Any) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self._answers = iter(answers)

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        assert path == "/completion"
        self.bodies.append(body)
        return json.dumps(next(self._answers)).encode()

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        assert path == "/completion"
        self.bodies.append(body)
        yield from next(self._answers)


def completion_of(connection: ScriptedConnection, **request: Any) -> LlamaCompletion:
    engine: Any = SimpleNamespace(
        server=SimpleNamespace(connect=lambda: connection),
        sampling=Sampling(),
        context_length=99,
        probabilities=Probabilities(5, TOKENS, plain=4),
    )
    values: dict[str, Any] = {"messages": [], "max_tokens": 5} | request
    return LlamaCompletion(engine, GenerationRequest(**values), [10, 11])


def position(token: int, data: bytes, logprob: float, *likely: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": token, "bytes": list(data), "logprob": logprob, "top_logprobs": list(likely)}


def answer(tokens: Sequence[int], *positions: Mapping[str, Any], stop: str = "limit") -> Any:
    return {
        "content": "unused",
        "tokens": tokens,
        "stop_type": stop,
        "completion_probabilities": positions,
        "timings": {"cache_n": 1},
    }


def test_a_completion_keeps_its_counts() -> None:
    events: list[dict[str, Any]] = [
        {"prompt_progress": {"total": 2, "cache": 1, "processed": 2}},
        {"content": "a", "tokens_predicted": 1},
        {"content": "", "tokens_predicted": 2, "stop": True, "stop_type": "eos"},
    ]
    completion = completion_of(ScriptedConnection(events))
    assert completion.size == 7
    assert list(completion.deltas()) == [
        Delta("", 2, 0, 1),
        Delta("a", 2, 1, 1),
        Delta("", 2, 2, 1, "stop"),
    ]


def test_a_completion_that_reaches_its_limit_says_so() -> None:
    event = {"content": "a", "tokens_predicted": 1, "stop": True, "stop_type": "limit"}
    assert list(completion_of(ScriptedConnection([event])).deltas()) == [
        Delta("a", 2, 1, 0, "length")
    ]


def test_a_completion_takes_what_the_context_leaves_of_its_tokens() -> None:
    event = {"content": "a", "tokens_predicted": 1, "stop": True, "stop_type": "eos"}
    connection = ScriptedConnection([event])
    completion = completion_of(connection, max_tokens=1000, fit_context=True)
    assert completion.size == 99
    list(completion.deltas())
    assert connection.bodies[0]["n_predict"] == 97


def test_a_stream_that_ends_early_is_an_error() -> None:
    completion = completion_of(ScriptedConnection([{"content": "a", "tokens_predicted": 1}]))
    with pytest.raises(ConnectionError, match="the stream ended early"):
        list(completion.deltas())


def test_each_token_of_a_completion_has_its_log_probability() -> None:
    likely = [position(5, b"b", -0.5), position(1, b"", -1.5), position(4, b"a", -2.0)]
    connection = ScriptedConnection(
        answer([4, 1], position(4, b"a", -2.0, *likely), position(1, b"", -3.4e38), stop="eos")
    )
    (delta,) = completion_of(connection, logprobs=2, seed=7).deltas()
    # A control token has the text that the file says; the one that ends the turn is left out.
    first = TokenLogprob(
        4, b"a", -2.0, (TokenLogprob(5, b"b", -0.5), TokenLogprob(1, b"<|end|>", -1.5))
    )
    assert delta == Delta("a", 2, 2, 1, "stop", logprobs=(first,))
    (body,) = connection.bodies
    assert (body["n_probs"], body["seed"], body["post_sampling_probs"]) == (2, 7, False)


def test_log_probabilities_come_some_tokens_at_a_time() -> None:
    connection = ScriptedConnection(
        answer([4] * 8, *[position(4, b"a", -1.0)] * 8),
        answer([5, 5], *[position(5, b"b", -1.0)] * 2),
    )
    first, last = completion_of(connection, logprobs=0, max_tokens=10, seed=7).deltas()
    assert (first.text, first.completion_tokens, first.finish_reason) == ("aaaaaaaa", 8, None)
    assert (last.text, last.completion_tokens, last.finish_reason) == ("bb", 10, "length")
    assert last.logprobs == (TokenLogprob(5, b"b", -1.0),) * 2
    one, two = connection.bodies
    assert (one["prompt"], one["n_predict"], one["seed"]) == ([10, 11], 8, 7)
    assert (two["prompt"], two["n_predict"], two["seed"]) == ([10, 11, *[4] * 8], 2, 15)


def test_a_guided_completion_is_one_request() -> None:
    connection = ScriptedConnection(answer([4] * 9, *[position(4, b"1", -1.0)] * 9))
    request = {"logprobs": 0, "max_tokens": 9, "guidance": '{"type": "integer"}'}
    (delta,) = completion_of(connection, **request).deltas()
    assert (delta.text, delta.finish_reason) == ("1" * 9, "length")


def test_tokens_that_end_inside_a_character_get_their_log_probabilities() -> None:
    # llama.cpp returns only that of the last one, so all are requested again.
    connection = ScriptedConnection(
        answer([8, 9], position(9, b"\xa9", -2.0), stop="limit"),
        # The first token still has none, so it is read from the whole vocabulary.
        answer([8]),
        answer([4], position(4, b"a", -9.0, position(9, b"\xa9", -0.5), position(8, b"\xc3", -1))),
        answer([9], position(9, b"\xa9", -2.5)),
    )
    (delta,) = completion_of(connection, logprobs=1, max_tokens=2).deltas()
    assert delta.text == "é"
    assert delta.logprobs == (
        TokenLogprob(8, b"\xc3", -1.0, (TokenLogprob(9, b"\xa9", -0.5),)),
        TokenLogprob(9, b"\xa9", -2.5),
    )
    prompts = [body["prompt"] for body in connection.bodies]
    assert prompts == [[10, 11], [10, 11], [10, 11], [10, 11, 8]]
    forced = [body["logit_bias"][0][0] for body in connection.bodies[1:]]
    assert forced == [8, 4, 9]
    assert connection.bodies[2]["n_probs"] == 5


def test_a_character_that_does_not_end_is_left_out() -> None:
    connection = ScriptedConnection(
        answer([8]), answer([8]), answer([4], position(4, b"a", -9.0, position(8, b"\xc3", -1.0)))
    )
    (delta,) = completion_of(connection, logprobs=0, max_tokens=1).deltas()
    assert (delta.text, delta.finish_reason) == ("", "length")
    assert delta.logprobs == (TokenLogprob(8, b"\xc3", -1.0),)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_completion_of_no_tokens_has_no_text(logprobs: int | None) -> None:
    event = {"content": "a", "tokens_predicted": 1, "stop": True, "stop_type": "limit"}
    connection = ScriptedConnection([event])
    (delta,) = completion_of(connection, max_tokens=0, logprobs=logprobs).deltas()
    assert delta == Delta("", 2, 0, 0, "length")


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    likely = position(5, b"b", -0.5)
    connection = ScriptedConnection(
        answer([10], position(10, b"x", -7.0, likely)),
        answer([11], position(11, b"y", -2.0, likely)),
        [{"content": "", "tokens_predicted": 0, "stop": True, "stop_type": "limit"}],
    )
    second = TokenLogprob(11, b"y", -2.0, (TokenLogprob(5, b"b", -0.5),))
    deltas = list(completion_of(connection, prompt_logprobs=1, max_tokens=0).deltas())
    assert deltas == [
        Delta("", 2, 0, prompt_logprobs=(TokenLogprob(10, b"x", None),)),
        Delta("", 2, 0, prompt_logprobs=(second,)),
        Delta("", 2, 0, 0, "length"),
    ]
    assert [body["prompt"] for body in connection.bodies] == [[10], [10], [10, 11]]


def test_a_random_seed_of_llama_cpp_is_never_sent() -> None:
    connection = ScriptedConnection([{"content": "", "stop": True, "stop_type": "eos"}])
    list(completion_of(connection, seed=(1 << 32) - 1).deltas())
    assert connection.bodies[0]["seed"] == 0


def test_tokens_are_chosen_in_the_order_of_the_other_engines() -> None:
    assert sampling_fields(Sampling(0.7, 40, 0.9, 0.05, 1.1)) == {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
    }


# The guidance


NAMES = json.dumps({"type": "array", "items": {"type": "string"}, "maxItems": 2})


def test_a_proposal_has_a_grammar_and_another_schema_is_sent_as_it_is() -> None:
    assert guidance_fields(proposals.GUIDANCE) == {"grammar": to_gbnf(proposals.GUIDANCE)}
    assert guidance_fields(NAMES) == {"json_schema": json.loads(NAMES)}


@pytest.mark.parametrize(
    "text", ['["a","b"]', '[ "a",\n "b" ]', "[]", '["\\u00e9\\ud83d\\ude00\\n"]']
)
def test_an_answer_that_follows_its_schema_is_fine(text: str) -> None:
    check_answer(NAMES, text)


@pytest.mark.parametrize(
    "text", ['["a","b","c"]', '["a"', "[1]", "", "[] x", '["\\ud83d"]', '["\\x"]']
)
def test_an_answer_that_breaks_its_schema_fails(text: str) -> None:
    with pytest.raises(ModelUnavailable, match="does not follow its JSON schema"):
        check_answer(NAMES, text)


def test_a_completion_that_breaks_its_schema_fails_before_its_last_delta() -> None:
    events = [
        {"content": "[1]", "tokens_predicted": 3},
        {"content": "", "tokens_predicted": 4, "stop": True, "stop_type": "eos"},
    ]
    deltas = completion_of(ScriptedConnection(events), guidance=NAMES).deltas()
    assert next(deltas).text == "[1]"
    with pytest.raises(ModelUnavailable, match="does not follow its JSON schema"):
        next(deltas)


# The capacity


def test_reservations_are_granted_in_their_order() -> None:
    capacity = Capacity(slots=4, tokens=10)
    small = capacity.reserve(6)
    large = capacity.reserve(9)
    other = capacity.reserve(1)
    assert [one.granted.is_set() for one in (small, large, other)] == [True, False, False]
    capacity.release(small)
    assert [one.granted.is_set() for one in (large, other)] == [True, True]


def test_reservations_beyond_the_slots_wait() -> None:
    capacity = Capacity(slots=1, tokens=10)
    one, two = capacity.reserve(1), capacity.reserve(1)
    assert (one.granted.is_set(), two.granted.is_set()) == (True, False)
    capacity.release(one)
    assert two.granted.is_set()


def test_a_reservation_that_waits_can_be_released() -> None:
    capacity = Capacity(slots=4, tokens=10)
    capacity.reserve(6)
    waiting, small = capacity.reserve(9), capacity.reserve(1)
    capacity.release(waiting)
    assert small.granted.is_set()


# The context


@pytest.mark.parametrize(
    ("free", "trained", "context"),
    [
        # an eighth of 8 GiB at 128 KiB a token
        (8 * GIB + 1000, 131_072, 8192),
        (8 * GIB + 1000, 2048, 2048),
        (8 * GIB + 1000, 8192, 8192),
        (GIB, 131_072, 4096),
        (0, 131_072, 4096),
        (64 * GIB, 131_072, 16_384),
        (None, 131_072, 16_384),
        (9 * GIB, 131_072, 9216 - 256),
        (8 * GIB, 0, 4096),
    ],
)
def test_the_context_is_what_the_memory_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int | None, trained: int, context: int
) -> None:
    monkeypatch.setattr(llama_cpp, "free_memory", lambda: free)
    found, notes = context_of(model_of(tmp_path, context_length=trained))
    assert found == context
    expected = f"the context is {context} of the model's {trained} tokens, to bound the memory"
    assert notes == ((expected,) if context < trained else ())


# The connection


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_only_a_request_that_runs_waits_for_the_end_of_a_server_that_hangs_up(
    is_cancelled: bool,
) -> None:
    waited: list[float] = []
    server: Any = SimpleNamespace(_watcher=SimpleNamespace(join=waited.append))
    closed: list[bool] = []
    connection: Any = SimpleNamespace(is_cancelled=is_cancelled, close=lambda: closed.append(True))
    with (
        pytest.raises(ConnectionResetError),
        llama_server.LlamaServer.watching(server, connection),
    ):
        raise ConnectionResetError
    assert waited == [1.0] * (not is_cancelled)
    assert closed == [True]


class FailingConnection(ScriptedConnection):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        raise self._error


@pytest.mark.parametrize("error", [ModelUnavailable("refused"), TimeoutError()])
def test_a_request_fails_alone(error: Exception) -> None:
    capacity = Capacity(slots=2, tokens=100)
    engine: Any = SimpleNamespace(
        capacity=capacity, server=SimpleNamespace(watching=contextlib.nullcontext)
    )
    batch = LlamaBatch(engine, 2)
    good, bad = (
        completion_of(connection)
        for connection in (
            ScriptedConnection([{"content": "a", "stop": True, "stop_type": "eos"}]),
            FailingConnection(error),
        )
    )
    for number, completion in enumerate((good, bad)):
        batch._completions[number] = completion
        batch._read(number, completion, capacity.reserve(completion.size))
    assert batch.step() == [(0, Delta("a", 2, 0, 0, "stop")), (1, error)]
    assert len(batch) == 0
    # Their parts of the capacity are free again.
    assert capacity.reserve(100).granted.is_set()


# The tokenizer


def test_control_tokens_are_found_where_a_text_spells_them() -> None:
    tokenizer = GgufTokenizer(TOKENS, 5, lambda text, begin: [9] * begin + [len(text)])
    (found,) = tokenizer.encode_batch(["a<|end|>x<tool><|end|>"])
    assert (found.ids, found.offsets) == ([2, 3, 1], [(1, 9), (9, 15), (15, 22)])
    assert tokenizer.encode_batch_fast(["abc"])[0].ids == [3]
    assert tokenizer.encode_batch_fast(["abc"], add_special_tokens=True)[0].ids == [9, 3]
    assert set(tokenizer.get_vocab().values()) == {0, 1, 2, 3, 4}


def test_a_vocabulary_without_control_tokens_spells_none() -> None:
    tokenizer = GgufTokenizer({}, 5, lambda text, begin: [])
    assert tokenizer.encode_batch(["<|end|>"])[0].ids == []


def test_half_of_a_surrogate_pair_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        GgufTokenizer(TOKENS, 5, lambda text, begin: []).encode_batch_fast(["\ud800"])


# The program


def test_the_configured_program_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_program(sys.executable) == sys.executable
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}")
    assert find_program(None) == "/opt/llama-server"
    assert find_program("llama") == "/opt/llama"


def test_the_wheel_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert find_program(None) is None
    with pytest.raises(ModelUnavailable, match="LLAMA_SERVER: llama is not an executable"):
        find_program("llama")


def test_without_any_llama_cpp_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable) as raised:
        find_program(None)
    assert raised.value.detail == (
        "a .gguf file needs llama.cpp: install the wheel (pip install -r requirements-gguf.txt), "
        "or set LLAMA_SERVER to a llama-server"
    )


@pytest.mark.parametrize(
    ("lines", "code", "reason"),
    [
        (
            ["I loading", "E load: error loading model: bad magic"],
            1,
            "error loading model: bad magic",
        ),
        (["E srv: failed to load model"], 1, "failed to load model"),
        (["I loading"], -9, "signal SIGKILL"),
        ([], 2, "exit status 2"),
    ],
)
def test_the_first_error_is_the_reason(lines: list[str], code: int, reason: str) -> None:
    assert reason_of_failure(lines, code) == reason


def test_a_server_listens_on_loopback_only_and_gets_no_key_on_its_command_line() -> None:
    options = llama_server.Options("/m.gguf", 4096, 4, 2, 256, 256, 0, "/a.gguf")
    arguments = llama_process.arguments(asdict(options))
    text = " ".join(arguments)
    assert "--model /m.gguf --host 127.0.0.1 --port 0 --ctx-size 4096 --parallel 4" in text
    assert "--n-gpu-layers 0 --lora /a.gguf" in text
    assert "key" not in text

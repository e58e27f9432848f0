"""The parts of the engine for GGUF models that need no llama.cpp."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_sidecar.engines import llama_cpp, llama_process, llama_server
from llm_sidecar.engines.base import Delta
from llm_sidecar.engines.gguf_model import GgufModel, Token
from llm_sidecar.engines.gguf_tokenizer import GgufTokenizer
from llm_sidecar.engines.llama_batch import FreeContext, LlamaBatch, StreamedCompletion
from llm_sidecar.engines.llama_cpp import context_of
from llm_sidecar.engines.llama_server import find_program, read_events, reason_of_failure
from llm_sidecar.errors import ModelUnavailable

GIB = 1 << 30


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


def test_a_completion_keeps_its_counts() -> None:
    completion = StreamedCompletion({}, prompt_tokens=7, limit=5)
    assert completion.size == 12
    events: list[dict[str, Any]] = [
        {"prompt_progress": {"total": 7, "cache": 4, "processed": 7}},
        {"content": "a", "tokens_predicted": 1},
        {"content": "", "tokens_predicted": 2, "stop": True, "stop_type": "eos"},
    ]
    assert list(map(completion.delta, events)) == [
        Delta("", 7, 0, 4),
        Delta("a", 7, 1, 4),
        Delta("", 7, 2, 4, "stop"),
    ]


def test_a_completion_that_reaches_its_limit_says_so() -> None:
    completion = StreamedCompletion({}, prompt_tokens=7, limit=1)
    event = {"content": "a", "tokens_predicted": 1, "stop": True, "stop_type": "limit"}
    assert completion.delta(event) == Delta("a", 7, 1, 0, "length")


def test_context_is_reserved_and_released() -> None:
    free = FreeContext(10)
    assert free.try_reserve(6)
    assert not free.try_reserve(5)
    with free.reserved(4):
        assert not free.try_reserve(1)
    free.release(6)
    assert free.try_reserve(10)


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


@pytest.mark.parametrize("is_removed", [False, True])
def test_only_a_request_that_runs_waits_for_the_end_of_a_server_that_hangs_up(
    is_removed: bool,
) -> None:
    waited: list[bool] = []

    def events(*arguments: object) -> None:
        raise ConnectionResetError

    server = SimpleNamespace(events=events, await_end=lambda: waited.append(True))
    engine: Any = SimpleNamespace(server=server, free_context=FreeContext(0))
    completion: Any = StreamedCompletion({}, prompt_tokens=7, limit=5)
    completion.connection = SimpleNamespace(close=lambda: None)
    completion.is_removed = is_removed
    LlamaBatch(engine, 1)._read(1, completion)
    assert waited == [True] * (not is_removed)
    # Its part of the context is free again.
    assert engine.free_context.try_reserve(12)


# The tokenizer


TOKENS = {
    1: Token("<|end|>", special=True),
    2: Token("<|end|>x", special=True),
    3: Token("<tool>", special=False),
}


def test_control_tokens_are_found_where_a_text_spells_them() -> None:
    tokenizer = GgufTokenizer(TOKENS, lambda text: [len(text)])
    (found,) = tokenizer.encode_batch(["a<|end|>x<tool><|end|>"])
    assert (found.ids, found.offsets) == ([2, 3, 1], [(1, 9), (9, 15), (15, 22)])
    assert tokenizer.encode_batch_fast(["abc"])[0].ids == [3]


def test_a_vocabulary_without_control_tokens_spells_none() -> None:
    tokenizer = GgufTokenizer({}, lambda text: [])
    assert tokenizer.encode_batch(["<|end|>"])[0].ids == []


def test_half_of_a_surrogate_pair_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        GgufTokenizer(TOKENS, lambda text: []).encode_batch_fast(["\ud800"])


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

"""The protocol of a worker process, spoken to the real program with a fake engine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live_server import ROOT

SPEC: dict[str, Any] = {
    "folder": "/models/fake",
    "device": "cpu",
    "threads": 1,
    "adapter": None,
    "prefix": None,
    "warm_up": {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1},
}
SPEC["warm_up"]["guidance"] = None
LONG = "slow " * 100


class Process:
    """A worker process.

    Attributes:
        said: every message so far, in order.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.said: list[dict[str, Any]] = []

    def tell(self, **message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next message."""
        assert self._process.stdout is not None
        message: dict[str, Any] = json.loads(self._process.stdout.readline())
        self.said.append(message)
        return message

    def hear_until(self, op: str, number: int) -> dict[str, Any]:
        """The first message of that kind about a request."""
        while (message := self.hear()) and (message["op"], message.get("id")) != (op, number):
            pass
        return message

    def end(self) -> int:
        """Ends its input, and returns its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(10)

    def generate(self, number: int, text: str, max_tokens: int = 1000) -> None:
        messages = [{"role": "user", "content": text}]
        request = {"messages": messages, "max_tokens": max_tokens}
        self.tell(op="generate", id=number, request=request)


@contextlib.contextmanager
def started() -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    with process:
        try:
            yield Process(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def one() -> Iterator[Process]:
    """One worker for all tests that leave it as it was; each has request numbers of its own."""
    with started() as process:
        process.tell(**SPEC)
        assert process.hear()["op"] == "ready"
        yield process


def about(process: Process, number: int) -> list[dict[str, Any]]:
    """What it has said of a request, without times."""
    told = [message for message in process.said if message.get("id") == number]
    return [{name: value for name, value in said.items() if name != "at"} for said in told]


# Loading


def test_it_says_what_it_has_loaded_and_ends_with_its_input() -> None:
    with started() as process:
        process.tell(**SPEC)
        ready = process.hear()
        assert {name: value for name, value in ready.items() if name != "at"} == {
            "op": "ready",
            "runtime": "fake",
            "device": "cpu",
            "context_length": 100,
            "together": 2,
        }
        assert process.end() == 0


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"folder": "/models/missing"}, "it holds no model"),
        (
            {"warm_up": {"messages": [{"role": "u", "content": "fail"}], "max_tokens": 1}},
            "RuntimeError: fail",
        ),
    ],
)
def test_it_says_why_a_model_does_not_load(changes: dict[str, Any], detail: str) -> None:
    for warm_up in filter(None, [changes.get("warm_up")]):
        warm_up["guidance"] = None
    with started() as process:
        process.tell(**SPEC | changes)
        failed = process.hear()
        assert (failed["op"], failed["detail"]) == ("failed", detail)


# Generating


def test_a_completion_comes_in_parts_that_add_up(one: Process) -> None:
    one.generate(1, LONG)
    done = one.hear_until("done", 1)
    told = about(one, 1)
    assert told[0]["op"] == "begun"
    assert {message["op"] for message in told[1:-1]} == {"delta"}
    assert "".join(message["text"] for message in told[1:]) == LONG
    counts = [message["completion_tokens"] for message in told[1:]]
    assert counts == sorted(counts)
    expected = {
        "completion_tokens": 100,
        "prompt_tokens": len(LONG),
        "cached_tokens": 1,
        "finish_reason": "stop",
    }
    assert {name: done[name] for name in expected} == expected


def test_the_first_word_is_not_held_back(one: Process) -> None:
    one.generate(2, LONG)
    one.hear_until("begun", 2)
    first = one.hear_until("delta", 2)
    assert (first["text"], first["completion_tokens"], first["finish_reason"]) == ("slow ", 1, None)
    one.hear_until("done", 2)


def test_a_budget_ends_a_completion(one: Process) -> None:
    one.generate(3, "one two three", max_tokens=2)
    done = one.hear_until("done", 3)
    assert (done["finish_reason"], done["completion_tokens"]) == ("length", 2)


def test_all_tokens_are_counted(one: Process) -> None:
    one.generate(4, "one two three")
    before = one.hear_until("done", 4)["total_tokens"]
    one.generate(5, "one two")
    assert one.hear_until("done", 5)["total_tokens"] == before + 2


def test_two_are_generated_together_and_the_third_waits(one: Process) -> None:
    for number in (10, 11, 12):
        one.generate(number, "slow " * 20)
    one.hear_until("done", 12)
    answered = [(said["op"], said.get("id")) for said in one.said if said["op"] != "begun"]
    # Each of the first two has a word before either is done; the third has none until then.
    first_done = min(answered.index(("done", number)) for number in (10, 11))
    assert answered.index(("delta", 10)) < first_done
    assert answered.index(("delta", 11)) < first_done
    assert answered.index(("delta", 12)) > first_done


def test_a_cancelled_request_ends_early(one: Process) -> None:
    one.generate(20, LONG)
    one.hear_until("delta", 20)
    one.tell(op="cancel", id=20)
    done = one.hear_until("done", 20)
    assert done["finish_reason"] is None
    assert 0 < done["completion_tokens"] < 100
    one.generate(21, "one")
    assert one.hear_until("done", 21)["text"] == "one "


def test_a_request_that_is_refused_says_why(one: Process) -> None:
    one.generate(30, "refuse")
    error = one.hear_until("error", 30)
    assert (error["invalid"], error["detail"]) == (True, "prompt: it does not fit")


def test_a_failing_engine_is_reported_without_quoting_the_request(one: Process) -> None:
    one.generate(31, "fail")
    assert one.hear_until("error", 31)["detail"] == "RuntimeError"
    assert "invalid" not in one.said[-1] or one.said[-1]["invalid"] is False
    one.generate(32, "one")
    assert one.hear_until("done", 32)["text"] == "one "


# Probabilities


def choose(process: Process, number: int, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    process.tell(op="choose", id=number, messages=messages, answers=["0", "1"])


def test_probabilities_come_in_one_message(one: Process) -> None:
    choose(one, 40, "Score it.")
    assert one.hear_until("done", 40)["probabilities"] == {"0": 0.5, "1": 0.5}
    assert [message["op"] for message in about(one, 40)] == ["begun", "done"]
    choose(one, 41, "fail")
    assert one.hear_until("error", 41)["detail"] == "RuntimeError"


# Prefixes


def prepare(process: Process, number: int, text: str) -> None:
    request = {"messages": [{"role": "system", "content": text}], "max_tokens": 1}
    process.tell(op="prepare", id=number, request=request)


def test_a_prefix_is_prepared_while_there_is_nothing_else_to_do(one: Process) -> None:
    prepare(one, 50, "Propose.")
    assert one.hear_until("done", 50)
    prepare(one, 51, "fail")
    assert one.hear_until("error", 51)["detail"] == "RuntimeError"


def test_nothing_is_said_but_messages(one: Process) -> None:
    assert {message["op"] for message in one.said} <= {"ready", "begun", "delta", "done", "error"}
    times = [message["at"] for message in one.said]
    assert times == sorted(times)


def test_importing_it_loads_no_runtime() -> None:
    code = (
        "import sys, llm_sidecar.models.local.worker; "
        "print([m for m in ('torch', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"

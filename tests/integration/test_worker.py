"""The protocol of a worker process: the real program, with a fake engine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import msgspec
import pytest

from llm_sidecar.engines import EngineOptions, GenerationRequest
from llm_sidecar.engines.base import ChoiceScores, Question, TokenLogprob
from llm_sidecar.models.local.protocol import (
    FROM_WORKER,
    Answer,
    Begun,
    Cancel,
    Check,
    Done,
    Failed,
    Generate,
    Load,
    LoadFailed,
    Prefill,
    Progress,
    PromptLogprobs,
    PromptText,
    Ready,
    ScoreQuestions,
    Scores,
    encode,
    is_final,
)
from tests.live_server import ROOT

T = TypeVar("T", bound=Answer)

LOAD = Load("/models/fake", EngineOptions("cpu"))
LONG = "slow " * 100


class Process:
    """A worker process.

    Attributes:
        answers: every answer to a job so far, in order.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.answers: list[Answer] = []

    def send(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(encode(message))
        self._process.stdin.flush()

    def read(self) -> Ready | LoadFailed | Answer:
        """The next message."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message: Ready | LoadFailed | Answer = FROM_WORKER.decode(line)
        if isinstance(message, Answer):
            self.answers.append(message)
        return message

    def read_until(self, kind: type[T], number: int) -> T:
        """The first message of that kind about a job."""
        while True:
            message = self.read()
            if isinstance(message, kind) and message.id == number:
                return message

    def read_to_end(self, number: int) -> Progress:
        """The last progress of a completion."""
        while True:
            progress = self.read_until(Progress, number)
            if is_final(progress):
                return progress

    def about(self, number: int) -> list[Answer]:
        """Every answer to a job so far."""
        return [answer for answer in self.answers if answer.id == number]

    def end(self) -> int:
        """Closes its input; returns its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(10)

    def generate(self, number: int, text: str, max_tokens: int = 1000) -> None:
        self.send(Generate(id=number, request=request(text, max_tokens)))


def request(text: str, max_tokens: int = 1) -> GenerationRequest:
    return GenerationRequest([{"role": "user", "content": text}], max_tokens)


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
        process.send(LOAD)
        assert isinstance(process.read(), Ready)
        yield process


# Loading


def loaded(process: Process) -> tuple[str | None, str | None, int, int]:
    """What it says once it has loaded: runtime, device, context and capacity."""
    ready = process.read()
    assert isinstance(ready, Ready)
    return ready.identity.runtime, ready.identity.device, ready.context_length, ready.capacity


def test_it_is_ready_with_what_it_has_loaded_and_ends_with_its_input() -> None:
    with started() as process:
        process.send(LOAD)
        assert loaded(process) == ("fake", "cpu", 100, 2)
        assert process.end() == 0


@pytest.mark.parametrize(
    ("folder", "detail", "permanent"),
    [
        ("/models/missing", "it holds no model", True),
        ("/models/damaged", "RuntimeError: fail", False),
    ],
)
def test_it_explains_why_a_model_does_not_load(folder: str, detail: str, permanent: bool) -> None:
    with started() as process:
        process.send(msgspec.structs.replace(LOAD, model=folder))
        assert process.read() == LoadFailed(detail, permanent)


@pytest.mark.parametrize("text", ["Propose.", "fail"])
def test_it_loads_with_a_prefix_even_if_that_cannot_be_prefilled(text: str) -> None:
    with started() as process:
        process.send(msgspec.structs.replace(LOAD, prefix=request(text)))
        assert loaded(process) == ("fake", "cpu", 100, 2)


# Generating


def test_a_completion_is_the_sum_of_its_texts(one: Process) -> None:
    one.generate(1, LONG)
    last = one.read_to_end(1)
    begun, *progress = one.about(1)
    assert isinstance(begun, Begun)
    texts = [answer for answer in progress if isinstance(answer, Progress)]
    assert texts == progress
    assert "".join(answer.text for answer in texts) == LONG
    assert sum(answer.new_tokens for answer in texts) == 100
    counts = [answer.completion_tokens for answer in texts]
    assert counts == sorted(counts)
    assert [answer.finish_reason for answer in texts] == [None] * (len(texts) - 1) + ["stop"]
    assert (last.completion_tokens, last.prompt_tokens, last.cached_tokens) == (100, len(LONG), 1)


def test_the_first_word_is_sent_at_once(one: Process) -> None:
    one.generate(2, LONG)
    one.read_until(Begun, 2)
    first = one.read_until(Progress, 2)
    assert (first.text, first.completion_tokens, first.finish_reason) == ("slow ", 1, None)
    one.read_to_end(2)


def test_the_token_limit_ends_a_completion(one: Process) -> None:
    one.generate(3, "one two three", max_tokens=2)
    last = one.read_to_end(3)
    assert (last.finish_reason, last.completion_tokens) == ("length", 2)


def test_all_tokens_are_counted(one: Process) -> None:
    for number, text, tokens in ((4, "one two three", 3), (5, "one two", 2)):
        one.generate(number, text)
        one.read_to_end(number)
        progress = [answer for answer in one.about(number) if isinstance(answer, Progress)]
        assert sum(answer.new_tokens for answer in progress) == tokens


def test_two_are_generated_at_a_time_and_the_third_waits(one: Process) -> None:
    for number in (10, 11, 12):
        one.generate(number, "slow " * 20)
    one.read_to_end(12)
    order = [
        (answer.id, is_final(answer)) for answer in one.answers if isinstance(answer, Progress)
    ]
    # Each of the first two has a word before either ends; the third has none until then.
    first_end = min(order.index((number, True)) for number in (10, 11))
    assert order.index((10, False)) < first_end
    assert order.index((11, False)) < first_end
    assert order.index((12, False)) > first_end


def test_a_cancelled_job_ends_early(one: Process) -> None:
    one.generate(20, LONG)
    one.read_until(Progress, 20)
    one.send(Cancel(20))
    one.read_until(Done, 20)
    last = one.about(20)[-2]
    assert isinstance(last, Progress)
    assert last.finish_reason is None
    assert 0 < last.completion_tokens < 100
    one.generate(21, "one")
    assert one.read_to_end(21).text == "one "


def test_a_request_that_is_refused_has_a_reason(one: Process) -> None:
    one.generate(30, "refuse")
    failed = one.read_until(Failed, 30)
    assert (failed.invalid, failed.field, failed.detail) == (True, "prompt", "it does not fit")


def test_a_failing_engine_is_reported_without_quoting_the_request(one: Process) -> None:
    one.generate(31, "fail")
    failed = one.read_until(Failed, 31)
    assert (failed.invalid, failed.detail) == (False, "RuntimeError")
    one.generate(32, "one")
    assert one.read_to_end(32).text == "one "


def test_a_request_that_fails_alone_has_its_own_reason(one: Process) -> None:
    one.generate(33, LONG)
    one.read_until(Begun, 33)
    one.generate(34, "alone")
    failed = one.read_until(Failed, 34)
    assert (failed.invalid, failed.field, failed.detail) == (True, "schema", "it is too complex")
    assert one.read_to_end(33).completion_tokens == 100


def test_log_probabilities_come_with_the_text_and_those_of_the_prompt_before_it(
    one: Process,
) -> None:
    text = "one two three"
    asked = replace(request(text, 3), logprobs=0, prompt_logprobs=0, echo=True)
    one.send(Generate(id=36, request=asked))
    one.read_to_end(36)
    begun, echo, prompt, *progress = one.about(36)
    assert isinstance(begun, Begun)
    assert isinstance(echo, PromptText)
    assert echo.text == "0 1 2"
    assert isinstance(prompt, PromptLogprobs)
    assert prompt.tokens == tuple(TokenLogprob(ord(c), c.encode(), -1.5) for c in text)
    found = [token for answer in progress for token in getattr(answer, "logprobs", ())]
    assert found == [
        TokenLogprob(number, word.encode(), -0.5) for number, word in enumerate(text.split())
    ]


def test_log_probabilities_of_a_long_prompt_come_in_pieces(one: Process) -> None:
    asked = replace(request("slow " * 60, 1), prompt_logprobs=0)
    one.send(Generate(id=37, request=asked))
    one.read_to_end(37)
    pieces = [answer for answer in one.about(37) if isinstance(answer, PromptLogprobs)]
    assert sum(len(piece.tokens) for piece in pieces) == 300


def test_a_check_ends_without_a_result(one: Process) -> None:
    one.send(Check(id=35, request=request("one")))
    one.read_until(Done, 35)
    assert [type(answer) for answer in one.about(35)] == [Done]


# Scores


def score(process: Process, number: int, *texts: str) -> None:
    questions = [Question(request(text).messages, ["0", "1"]) for text in texts]
    process.send(ScoreQuestions(id=number, questions=questions))


def test_scores_come_in_one_message(one: Process) -> None:
    score(one, 40, "Score it.")
    assert one.read_until(Scores, 40).scores == [ChoiceScores({"0": 0.5, "1": 0.5}, 2)]
    assert [type(answer) for answer in one.about(40)] == [Begun, Scores]
    score(one, 41, "fail")
    assert one.read_until(Failed, 41).detail == "RuntimeError"


def test_scores_that_are_no_numbers_are_a_failure(one: Process) -> None:
    score(one, 42, "nan")
    assert one.read_until(Failed, 42).detail == "its probabilities are not finite numbers"


def test_several_questions_are_answered_in_their_order(one: Process) -> None:
    score(one, 43, "One.", "And another one.")
    assert [scores.prompt_tokens for scores in one.read_until(Scores, 43).scores] == [1, 3]
    score(one, 44, "One.", "fail")
    assert one.read_until(Failed, 44).detail == "RuntimeError"


def test_a_text_is_generated_between_the_steps_of_a_score(one: Process) -> None:
    score(one, 45, *["slow"] * 100)
    one.generate(46, "one two")
    one.read_to_end(46)
    assert not any(isinstance(answer, Scores) for answer in one.about(45))
    assert len(one.read_until(Scores, 45).scores) == 100


def test_a_score_is_cancelled_between_two_questions(one: Process) -> None:
    score(one, 47, *["slow"] * 10_000)
    one.read_until(Begun, 47)
    one.send(Cancel(47))
    one.read_until(Done, 47)
    assert [type(answer) for answer in one.about(47)] == [Begun, Done]


# Prefixes


def test_a_prefix_is_prefilled_while_there_is_nothing_else_to_do(one: Process) -> None:
    one.send(Prefill(id=50, request=request("Propose.")))
    one.read_until(Done, 50)
    one.send(Prefill(id=51, request=request("fail")))
    assert one.read_until(Failed, 51).detail == "RuntimeError"


def test_answers_carry_the_times_at_which_they_were_written(one: Process) -> None:
    times = [answer.at for answer in one.answers]
    assert len(times) > 10
    assert times == sorted(times)


def test_importing_it_loads_no_runtime_and_no_pydantic() -> None:
    code = (
        "import sys, llm_sidecar.models.local.worker; "
        "heavy = ('torch', 'onnxruntime', 'transformers', 'pydantic'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"

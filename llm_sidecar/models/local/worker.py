"""The process that holds one engine: `python -m llm_sidecar.models.local.worker`.

Messages in both directions are one JSON object a line. In, on standard input: first what to load,
then requests, cancellations, requests to check and prefixes to prepare. Out, on the former standard
output: `ready` or `failed`; then for every request `begun`, `delta`s, and one `done` or `error`;
for a check or a prefix only `done` or `error`. Each has the monotonic time at which it was sent.
The end of the input ends the process, so that no worker outlives its server.

A message passes through three threads: one reads it, one tokenizes its texts, and the main thread
generates. Long texts have a tokenizing thread of their own. So generation never waits for
tokenizing, and a short text never waits for a long one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import ANSWER_TOKENS, Batch
from llm_sidecar.errors import InvalidRequest, SidecarError, one_line
from llm_sidecar.logs import log_to_stderr
from llm_sidecar.models.local.out_of_memory import ended_first
from llm_sidecar.text import cleaned

log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.02
"""Text goes out at most this often after the first token: one line per token would keep the
server's event loop busy with nothing else."""
_LONG_LINE: Final = 8192
"""Messages of more bytes count as long; a typical request has a thousand."""
_TOKENIZING_SECONDS: Final = 10.0
"""Limit of CPU time for one chat; the slowest text of the default length takes a fiftieth of it."""


@dataclass(slots=True)
class _Reply:
    """What of a completion has been sent, and when.

    Attributes:
        text: that has not.
        tokens: of the completion so far.
    """

    text: str = ""
    tokens: int = 0
    flushed: float = 0.0


class Worker:
    """Serves one engine: requests in order, as many together as it can."""

    def __init__(self, inbox: IO[bytes], outbox: IO[bytes]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._short: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._replies: dict[int, _Reply] = {}
        self._tokens = 0

    def run(self) -> None:
        """Loads what the first line names, then serves until the input ends."""
        first = self._inbox.readline()
        if not first:
            # The server has ended, or does not need this worker any more.
            return
        spec = json.loads(first)
        # Before loading: the server may go away meanwhile.
        threading.Thread(target=self._read, daemon=True).start()
        try:
            # Another worker may serve while this one loads.
            with ended_first():
                engine = _loaded(spec)
        except Exception as error:
            expected = isinstance(error, SidecarError)
            log.error("the model could not be loaded: %s", one_line(error), exc_info=not expected)
            self._send({"op": "failed", "detail": one_line(error)})
            return
        self._send(
            {
                "op": "ready",
                "runtime": engine.runtime,
                "device": engine.device,
                "context_length": engine.context_length,
                "together": engine.batch().capacity,
            }
        )
        for received in (self._short, self._long):
            arguments = (engine, received)
            threading.Thread(target=self._tokenize_all, args=arguments, daemon=True).start()
        self._serve_all(engine)

    def _read(self) -> None:
        for line in self._inbox:
            message = json.loads(line)
            if message["op"] == "cancel":
                # One that comes too late stays here, a number that nobody asks for.
                self._cancelled.add(message["id"])
            else:
                is_long = message["op"] == "prepare" or len(line) > _LONG_LINE
                (self._long if is_long else self._short).put(message)
        os._exit(0)

    def _tokenize_all(self, engine: Engine, received: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Tokenizes what has been received, and passes it on in the same order."""
        watch = _Watch(_TOKENIZING_SECONDS)
        with _ending_without_server():
            while True:
                message = received.get()
                number = message["id"]
                if number in self._cancelled:
                    self._cancelled.discard(number)
                    self._send({"op": "error", "id": number, "detail": "cancelled"})
                    continue
                if message["op"] in ("generate", "choose"):
                    # First: a request that has begun is not given to the next worker if this
                    # one crashes on it.
                    self._send({"op": "begun", "id": number})
                try:
                    with watch:
                        _tokenize(engine, message)
                except Exception as error:  # noqa: BLE001 - the packages raise bare ones
                    self._fail(number, error)
                else:
                    if message["op"] == "check":
                        self._send({"op": "done", "id": number})
                    else:
                        self._requests.put(message)

    def _serve_all(self, engine: Engine) -> None:
        """Takes requests in order, has them generated together, and prepares a prefix step by step
        while there are none."""
        batch = engine.batch()
        preparing: tuple[int, Generator[None]] | None = None
        while True:
            try:
                message = self._requests.get(block=not batch and preparing is None)
            except queue.Empty:
                if batch:
                    self._step(batch)
                elif preparing is not None and self._prepared(*preparing):
                    preparing = None
                continue
            if message["op"] == "prepare" and preparing is not None:
                # What it prepared is out of date.
                preparing[1].close()
                self._send({"op": "done", "id": preparing[0]})
                preparing = None
            match message["op"]:
                case "generate":
                    self._begin(batch, message)
                case "choose":
                    self._choose(engine, message)
                case "prepare":
                    steps = engine.prefill(GenerationRequest(**message["request"]))
                    preparing = message["id"], steps

    def _prepared(self, number: int, steps: Generator[None]) -> bool:
        """Takes one more step; returns whether it was the last."""
        try:
            next(steps)
        except StopIteration:
            self._send({"op": "done", "id": number})
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            # The type only: a runtime's message may quote the prompt.
            log.error("a prefix could not be prepared: %s", type(error).__name__)
            self._send({"op": "error", "id": number, "detail": type(error).__name__})
        else:
            return False
        return True

    def _begin(self, batch: Batch, message: dict[str, Any]) -> None:
        while len(batch) >= batch.capacity:
            self._step(batch)
        number = message["id"]
        try:
            batch.add(number, GenerationRequest(**message["request"]))
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            self._fail(number, error)
        else:
            self._replies[number] = _Reply()

    def _step(self, batch: Batch) -> None:
        """Has each request go on by one step, and sends what is due."""
        try:
            deltas = batch.step()
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            for number in tuple(self._replies):
                del self._replies[number]
                self._fail(number, error)
            return
        now = time.monotonic()
        for number, delta in deltas:
            reply = self._replies[number]
            reply.text += cleaned(delta.text)
            self._tokens += delta.completion_tokens - reply.tokens
            reply.tokens = delta.completion_tokens
            cancelled = number in self._cancelled
            if cancelled and delta.finish_reason is None:
                batch.remove(number)
            over = delta.finish_reason is not None or cancelled
            if over or (reply.tokens and now - reply.flushed >= _FLUSH_SECONDS):
                self._write(
                    {
                        "op": "done" if over else "delta",
                        "id": number,
                        "text": reply.text,
                        "prompt_tokens": delta.prompt_tokens,
                        "completion_tokens": reply.tokens,
                        "cached_tokens": delta.cached_tokens,
                        "finish_reason": delta.finish_reason,
                        "total_tokens": self._tokens,
                    }
                )
                reply.text, reply.flushed = "", now
            if over:
                del self._replies[number]
                self._cancelled.discard(number)
        # All at once: the server reads them in one go.
        self._outbox.flush()

    def _choose(self, engine: Engine, message: dict[str, Any]) -> None:
        number = message["id"]
        probabilities: dict[str, float] = {}
        try:
            if number not in self._cancelled:
                probabilities = engine.score_choices(
                    message["messages"], message["answers"], message["tokens"]
                )
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            self._fail(number, error)
        else:
            self._send({"op": "done", "id": number, "probabilities": probabilities})
        self._cancelled.discard(number)

    def _fail(self, number: int, error: Exception) -> None:
        """Reports that a request has failed, with the reason if it is known."""
        if isinstance(error, SidecarError):
            invalid = isinstance(error, InvalidRequest)
            if not invalid:
                log.error("a request failed: %s", error.detail)
            self._send({"op": "error", "id": number, "invalid": invalid, "detail": error.detail})
            return
        # Where and of which type only: a runtime's message may quote the prompt.
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("a request failed in the engine: %s\n%s", type(error).__name__, where)
        self._send({"op": "error", "id": number, "detail": type(error).__name__})

    def _send(self, message: dict[str, Any]) -> None:
        self._write(message)
        self._outbox.flush()

    def _write(self, message: dict[str, Any]) -> None:
        message["at"] = time.monotonic()
        self._outbox.write(json.dumps(message).encode() + b"\n")


def _loaded(spec: dict[str, Any]) -> Engine:
    """Loads the engine, warms it up, and reads the prefix that prompts begin with."""
    engine = load_engine(
        Path(spec["folder"]),
        device=spec["device"],
        threads=spec["threads"],
        adapter=None if spec["adapter"] is None else Path(spec["adapter"]),
    )
    for _ in engine.stream(GenerationRequest(**spec["warm_up"])):
        pass
    if spec["prefix"] is not None:
        _read_prefix(engine, GenerationRequest(**spec["prefix"]))
    return engine


def _read_prefix(engine: Engine, request: GenerationRequest) -> None:
    """Reads the prefix of prompts ahead; a failure is logged, as the model can serve without it."""
    try:
        for _ in engine.prefill(request):
            pass
    except InvalidRequest:
        log.warning("the few-shot examples do not fit the context, so they are not read ahead")
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
        # The type only: a runtime's message may quote the examples.
        log.error("a prefix could not be prepared: %s", type(error).__name__)


def _tokenize(engine: Engine, message: dict[str, Any]) -> None:
    """Adds the tokens of a message's texts to it."""
    if "request" in message:
        request = message["request"]
        header = message["op"] != "prepare"
        request["tokens"] = engine.tokenize(GenerationRequest(**request), header)
    elif "messages" in message:
        request = GenerationRequest(message["messages"], ANSWER_TOKENS)
        message["tokens"] = engine.tokenize(request)


class _Watch:
    """Ends this process if the thread that creates this object spends too long inside the context.

    A chat template or a regular expression of a tokenizer may never end, and Python cannot stop a
    thread. CPU time of the thread counts, because it may wait for the thread that generates. A call
    that never releases the GIL blocks the watch too; then the server kills this process, because
    the request does not end when it is cancelled.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began: float | None = None
        if hasattr(time, "pthread_getcpuclockid"):  # macOS has none
            clock = time.pthread_getcpuclockid(threading.get_ident())
            threading.Thread(target=self._look, args=(clock,), daemon=True).start()

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self._began = None

    def _look(self, clock: int) -> None:
        while True:
            time.sleep(1.0)
            began = self._began
            if began is not None and time.clock_gettime(clock) - began > self._seconds:
                log.error(
                    "tokenizing one chat took longer than %g s, so this worker ends; "
                    "check the chat template and the tokenizer in the model's folder",
                    self._seconds,
                )
                os._exit(1)


@contextlib.contextmanager
def _ending_without_server() -> Iterator[None]:
    """Ends this process when the server, which reads its output, has ended."""
    try:
        yield
    except BrokenPipeError:
        os._exit(0)


def main() -> None:
    """Runs a worker on the standard streams; whatever prints goes to standard error instead."""
    log_to_stderr(os.environ.get("LOG_FORMAT", "auto"))
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with _ending_without_server():
        Worker(sys.stdin.buffer, outbox).run()


if __name__ == "__main__":
    main()

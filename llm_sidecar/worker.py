"""The process that holds one engine: `python -m llm_sidecar.worker`, started by `model_host`.

Both directions are one JSON object a line. In, on standard input: first what to load, then
requests, cancellations and prefixes to prepare. Out, on what was standard output: `ready` or
`failed`, then for every request `begun`, `delta`s, and one `done` or `error`, for every prefix the
last of them alone; each with the monotonic time at which it was sent. The end of the input ends
the process, so that no worker outlives its server, however that ended.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import Together, one_line
from llm_sidecar.errors import SidecarError
from llm_sidecar.logs import log_to_stderr
from llm_sidecar.out_of_memory import ended_first
from llm_sidecar.text import cleaned

log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.02
"""Text goes out at most this often after the first token: one line per token would keep the
server's event loop busy with nothing else."""


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
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._replies: dict[int, _Reply] = {}
        self._tokens = 0

    def run(self) -> None:
        """Loads what the first line names, then serves until the input ends."""
        first = self._inbox.readline()
        if not first:
            # The server has gone, or does not need this worker any more.
            return
        spec = json.loads(first)
        # Before loading: the server may go away meanwhile.
        threading.Thread(target=self._read, daemon=True).start()
        try:
            # It may load beside the worker that serves.
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
                "together": engine.together().most,
            }
        )
        self._serve_all(engine)

    def _read(self) -> None:
        for line in self._inbox:
            message = json.loads(line)
            if message["op"] == "cancel":
                # One that comes too late stays here, a number that nobody asks for.
                self._cancelled.add(message["id"])
            else:
                self._requests.put(message)
        os._exit(0)

    def _serve_all(self, engine: Engine) -> None:
        """Takes requests in order, has them generated together, and prepares a prefix step by step
        while there are none."""
        together = engine.together()
        preparing: tuple[int, Generator[None]] | None = None
        while True:
            try:
                message = self._requests.get(block=not together and preparing is None)
            except queue.Empty:
                if together:
                    self._step(together)
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
                    self._begin(together, message)
                case "choose":
                    self._choose(engine, message)
                case "prepare":
                    steps = engine.prepare(GenerationRequest(**message["request"]))
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

    def _begin(self, together: Together, message: dict[str, Any]) -> None:
        while len(together) >= together.most:
            self._step(together)
        number = message["id"]
        self._send({"op": "begun", "id": number})
        try:
            together.add(number, GenerationRequest(**message["request"]))
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            self._fail(number, error)
        else:
            self._replies[number] = _Reply()

    def _step(self, together: Together) -> None:
        """Has each request go on by one step, and sends what is due."""
        try:
            deltas = together.step()
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
                together.remove(number)
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
        self._send({"op": "begun", "id": number})
        probabilities: dict[str, float] = {}
        try:
            if number not in self._cancelled:
                probabilities = engine.answer_probabilities(message["messages"], message["answers"])
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            self._fail(number, error)
        else:
            self._send({"op": "done", "id": number, "probabilities": probabilities})
        self._cancelled.discard(number)

    def _fail(self, number: int, error: Exception) -> None:
        """Tells that a request has failed, and why where that is the request's fault."""
        if isinstance(error, SidecarError):
            self._send({"op": "error", "id": number, "invalid": True, "detail": error.detail})
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
    """An engine that has answered once, and has read the prefix that prompts begin with."""
    engine = load_engine(
        Path(spec["folder"]),
        device=spec["device"],
        threads=spec["threads"],
        adapter=None if spec["adapter"] is None else Path(spec["adapter"]),
        # What warms it up is like what it will be asked.
        guided=spec["warm_up"]["guidance"] is not None,
    )
    for _ in engine.stream(GenerationRequest(**spec["warm_up"])):
        pass
    if spec["prefix"] is not None:
        _read_prefix(engine, GenerationRequest(**spec["prefix"]))
    return engine


def _read_prefix(engine: Engine, request: GenerationRequest) -> None:
    """Reads what prompts begin with; the model serves without it too."""
    try:
        for _ in engine.prepare(request):
            pass
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
        # The type only: a runtime's message may quote the examples.
        log.error("a prefix could not be prepared: %s", type(error).__name__)


def main() -> None:
    """Runs a worker on the standard streams; whatever prints goes to standard error instead."""
    log_to_stderr(os.environ.get("LOG_FORMAT", "auto"))
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        Worker(sys.stdin.buffer, outbox).run()
    except BrokenPipeError:
        # The server is gone, and nobody is left to tell.
        os._exit(0)


if __name__ == "__main__":
    main()

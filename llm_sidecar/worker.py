"""The process that holds one engine: `python -m llm_sidecar.worker`, started by `model_host`.

Both directions are one JSON object a line. In, on standard input: first what to load, then
requests, cancellations, prefixes to prepare and adapters to use. Out, on what was standard output:
`ready` or `failed`, then for every request `begun`, `delta`s, and one `done` or `error`, for every
prefix and adapter the last of them alone; each with the monotonic time at which it was sent. The
end of the input ends the process, so that no worker outlives its server, however that ended.
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
from pathlib import Path
from typing import IO, Any, Final

from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import one_line
from llm_sidecar.errors import SidecarError
from llm_sidecar.logs import log_to_stderr

log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.02
"""Text goes out at most this often after the first token: one line per token would keep the
server's event loop busy with nothing else."""


class Worker:
    """Serves one engine, one request after the other, in order."""

    def __init__(self, inbox: IO[bytes], outbox: IO[bytes]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._served = 0
        self._tokens = 0
        self._adapter: str | None = None

    def run(self) -> None:
        """Loads what the first line names, then serves until the input ends."""
        spec = json.loads(self._inbox.readline())
        # Before loading: the server may go away meanwhile.
        threading.Thread(target=self._read, daemon=True).start()
        try:
            engine = load_engine(
                Path(spec["folder"]),
                device=spec["device"],
                threads=spec["threads"],
                adapter=None if spec["adapter"] is None else Path(spec["adapter"]),
            )
            self._adapter = None if spec["adapter"] is None else Path(spec["adapter"]).name
            for _ in engine.stream(GenerationRequest(**spec["warm_up"])):
                pass
            if spec["prefix"] is not None:
                for _ in engine.prepare(GenerationRequest(**spec["prefix"])):
                    pass
        except Exception as error:
            log.exception("the model could not be loaded")
            self._send({"op": "failed", "detail": one_line(error)})
            return
        self._send(
            {
                "op": "ready",
                "runtime": engine.runtime,
                "device": engine.device,
                "context_length": engine.context_length,
            }
        )
        self._serve_all(engine)

    def _read(self) -> None:
        for line in self._inbox:
            message = json.loads(line)
            if message["op"] == "cancel":
                if message["id"] > self._served:
                    self._cancelled.add(message["id"])
            else:
                self._requests.put(message)
        os._exit(0)

    def _serve_all(self, engine: Engine) -> None:
        """Serves requests in order, and prepares a prefix step by step while there are none."""
        preparing: tuple[int, Generator[None]] | None = None
        while True:
            try:
                message = self._requests.get(block=preparing is None)
            except queue.Empty:
                assert preparing is not None
                if self._prepared(*preparing):
                    preparing = None
                continue
            if message["op"] not in ("prepare", "adapter"):
                self._serve(engine, message)
                continue
            if preparing is not None:
                # What it prepared is out of date.
                preparing[1].close()
                self._send({"op": "done", "id": preparing[0]})
                preparing = None
            if message["op"] == "adapter":
                self._use_adapter(engine, message)
            else:
                steps = engine.prepare(GenerationRequest(**message["request"]))
                preparing = message["id"], steps

    def _use_adapter(self, engine: Engine, message: dict[str, Any]) -> None:
        folder = Path(message["folder"])
        try:
            engine.use_adapter(folder)
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            log.error("the adapter %s is refused: %s", folder.name, one_line(error))
            self._send({"op": "error", "id": message["id"], "detail": one_line(error)})
        else:
            self._adapter = folder.name
            self._send({"op": "done", "id": message["id"]})

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

    def _serve(self, engine: Engine, message: dict[str, Any]) -> None:
        number = message["id"]
        self._send({"op": "begun", "id": number, "adapter": self._adapter})
        try:
            if message["op"] == "generate":
                self._generate(engine, number, GenerationRequest(**message["request"]))
            elif number in self._cancelled:
                self._send({"op": "done", "id": number, "probabilities": {}})
            else:
                answer = engine.answer_probabilities(message["messages"], message["answers"])
                self._send({"op": "done", "id": number, "probabilities": answer})
        except SidecarError as error:
            self._send({"op": "error", "id": number, "invalid": True, "detail": error.detail})
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            # Where and of which type only: a runtime's message may quote the prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed in the engine: %s\n%s", type(error).__name__, where)
            self._send({"op": "error", "id": number, "detail": type(error).__name__})
        finally:
            self._served = number
            self._cancelled.discard(number)

    def _generate(self, engine: Engine, number: int, request: GenerationRequest) -> None:
        text, sent, flushed = "", 0, 0.0
        for delta in engine.stream(request):
            text += delta.text
            self._tokens += delta.completion_tokens - sent
            sent = delta.completion_tokens
            over = delta.finish_reason is not None or number in self._cancelled
            now = time.monotonic()
            if over or (sent and now - flushed >= _FLUSH_SECONDS):
                self._send(
                    {
                        "op": "done" if over else "delta",
                        "id": number,
                        "text": text,
                        "prompt_tokens": delta.prompt_tokens,
                        "completion_tokens": sent,
                        "cached_tokens": delta.cached_tokens,
                        "finish_reason": delta.finish_reason,
                        "total_tokens": self._tokens,
                    }
                )
                text, flushed = "", now
            if over:
                return

    def _send(self, message: dict[str, Any]) -> None:
        message["at"] = time.monotonic()
        self._outbox.write(json.dumps(message).encode() + b"\n")
        self._outbox.flush()


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

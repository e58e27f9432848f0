"""The state of a model: its speed, its adapter, its replicas and its servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["unloaded", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: holds its files; the folder's name is the adapter's name.
    """

    folder: Path

    @property
    def name(self) -> str:
        """`YYYYMMDD` or `YYYYMMDD-dpo`."""
        return self.folder.name


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a model alone on its machine, measured once when it was loaded.

    Attributes:
        prefill, decode: prompt and completion tokens per second, of one request.
    """

    prefill: float
    decode: float

    def seconds(self, prompt_tokens: int, completion_tokens: int) -> float:
        """How long a request takes whose prompt is not cached."""
        return prompt_tokens / self.prefill + completion_tokens / self.decode

    def __str__(self) -> str:
        return f"prefill {self.prefill:.1f} tokens/s, decode {self.decode:.1f} tokens/s"


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The state of a server of a remote model, and its capabilities; None while unknown.

    Attributes:
        url: without credentials.
        state: `resting` while it gets no requests, because it is full or has failed several times;
            `away` while it cannot be reached or used.
        reason: why it is not ready; None if it is.
        model: the name of the model on the server.
        outstanding: number of running requests.
        schema: the strictest format in which it takes a schema; `prompt` for none.
        scores: how its answers are scored.
        top_logprobs: the number of most likely tokens whose log probabilities it returns.
        adapters: whether it loads LoRA adapters.
        decisions_refused: the number of questions that it did not answer by `/v1/decisions`, so
            that they were scored otherwise.
    """

    url: str
    state: Literal["ready", "resting", "away"]
    reason: str | None
    model: str | None
    outstanding: int
    schema: str | None
    scores: Literal["decisions", "logprobs", "text"] | None
    top_logprobs: int | None
    adapters: bool | None
    decisions_refused: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """The state of one of several replicas of a model.

    Attributes:
        state, reason, pid, restarts: see `ModelStatus`.
        adapter: the name of its adapter; during a change, replicas have different ones.
    """

    state: State
    reason: str | None
    adapter: str | None
    pid: int | None
    restarts: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The state of a model.

    Attributes:
        state: `unloaded` until the first request, unless it is preloaded.
        reason: why it failed, or None.
        not_ready: why a request that arrives now would most likely not be served in time; None if
            it would.
        model: its label, or None while it is not loaded.
        adapter: the adapter in use.
        runtime, device: what runs it, and where; None while it is not loaded.
        pid: the process id of its worker, or None.
        restarts: how often it was loaded again after a failure.
        completion_tokens_total: tokens that it has generated.
        requests: the number of requests that run or wait.
        queue_length: the maximum of `requests`.
        running: the number of requests that run now.
        speed: measured when the model was loaded; None until then.
        notes: where the sidecar deviates from the model's files, one sentence each.
        servers: of a remote model.
        replicas: if there are several; `restarts` is then their sum, and `pid`, `speed` and what
            else may differ are those of the first one that serves.
    """

    state: State = "ready"
    reason: str | None = None
    not_ready: str | None = None
    model: str | None = None
    adapter: Adapter | None = None
    runtime: str | None = None
    device: str | None = None
    pid: int | None = None
    restarts: int = 0
    completion_tokens_total: int = 0
    requests: int = 0
    queue_length: int = 0
    running: int = 0
    speed: Speed | None = None
    notes: tuple[str, ...] = ()
    servers: tuple[ServerStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()

"""Response models of the probes, and of each component in `/health`.

`/health` is not validated at run time, because it is requested every second; a test compares a real
answer with these models.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, Field

_MODEL: Final[dict[str, Any]] = {
    "state": "ready",
    "reason": None,
    "model": "phi3/Phi-3-mini-4k-instruct",
    "adapter": "20260131-dpo",
    "runtime": "onnxruntime",
    "device": "cpu",
    "pid": 4711,
    "restarts": 0,
    "completion_tokens_total": 18230,
    "requests": 3,
    "queue_length": 64,
    "running": 2,
    "speed": {"prefill": 283.1, "decode": 31.4},
    "notes": [],
    "servers": [],
    "replicas": [],
}
_REPLICA: Final[dict[str, Any]] = {
    "state": "failed",
    "reason": "The phi3 worker ended (signal SIGKILL)",
    "adapter": "20260131-dpo",
    "pid": 4712,
    "restarts": 1,
}
_SERVER: Final[dict[str, Any]] = {
    "url": "http://gpu-1:8000/v1",
    "state": "away",
    # Not null, because FastAPI removes null from examples.
    "reason": "The hermes server gpu-1:8000 cannot be reached (ConnectError); start it.",
    "model": "NousResearch/Hermes-3-Llama-3.1-8B",
    "outstanding": 2,
    "schema": "regex",
    "scores": "decisions",
    "top_logprobs": 20,
    "adapters": True,
    "decisions_refused": 0,
}
_FORECAST: Final[dict[str, Any]] = {
    "proposal_seconds": 3.962,
    "critique_seconds": 4.301,
    "score_seconds": 0.145,
    "timeout_seconds": 60.0,
    "warning": None,
}
_INBOX: Final[dict[str, Any]] = {
    "pending": 0,
    "dead": 1,
    "handled": 230,
    "claimed": 0,
    "failures": 0,
}
_EVENT_BUS: Final[dict[str, Any]] = {
    "connected": True,
    "url": "redis://localhost:6379/0",
    "outages": 0,
    "seconds_away": 0.0,
    "published": 1200,
    "published_late": 0,
    "waiting": 0,
    "unpublished": 0,
    "oldest_seconds": 0.0,
    "failing": None,
    "handler_errors": 0,
    "refused": 0,
    "dropped": 0,
    "pauses": 0,
    "denied": [],
    "warnings": [],
    "inbox": _INBOX,
    "listeners": 2,
}
_JOURNAL: Final[dict[str, Any]] = {
    "accepts_rows": True,
    "rows": 2,
    "bytes": 1480,
    "most_bytes": 67108864,
    "oldest_seconds": 0.4,
    "events": 1,
    "event_bytes": 612,
    "oldest_event_seconds": 0.1,
    "events_dropped": 0,
    "requests": 40,
    "request_bytes": 51200,
    "requests_dropped": 0,
}
_DATABASE: Final[dict[str, Any]] = {
    "state": "open",
    "reason": None,
    "uri": "/app/lancedb_data",
    "rows_written": 5310,
    "rows_waiting": 2,
    "journal": _JOURNAL,
    "fragments": {"proposals": 3},
    "last_compaction": "2026-01-31T10:00:00+00:00",
    "compaction_failure": None,
    "compaction_failures": 0,
    "repairs": [],
}
_WORKER: Final[dict[str, Any]] = {"worker_id": "gpu-1-8c2f61d0", "seconds_ago": 0.8}
_SPEECH: Final[dict[str, Any]] = {
    "state": "ready",
    "reason": None,
    "voice": "piper",
    "waiting": 0,
    "spoken": 17,
    "workers": [_WORKER],
    "queued": 0,
    "listeners": 1,
    "lost": 0,
}
EXAMPLES: Final = {
    "models": {"phi3": _MODEL},
    "forecast": _FORECAST,
    "event_bus": _EVENT_BUS,
    "database": _DATABASE,
    "speech": _SPEECH,
}
"""An example of each component in `/health`. FastAPI removes nulls from the examples of a field,
and without them these would not be valid."""


class ModelSpeed(BaseModel):
    """The speed of one request alone on the machine, measured when the model was loaded."""

    prefill: float = Field(description="prompt tokens per second", examples=[283.1])
    decode: float = Field(description="completion tokens per second", examples=[31.4])


class ServerHealth(BaseModel):
    """A server of a remote model, and its capabilities; null while they are unknown."""

    url: str = Field(description="its base URL, without credentials", examples=[_SERVER["url"]])
    state: Literal["ready", "resting", "away"] = Field(
        description="`ready`: it gets requests; `resting`: it is full or has failed several times, "
        "so it gets no requests for some seconds; `away`: it cannot be reached or used",
        examples=["ready"],
    )
    reason: str | None = Field(
        description="why it is not ready; null if it is",
        examples=[_SERVER["reason"]],
    )
    model: str | None = Field(
        description="the name of the model there", examples=[_SERVER["model"]]
    )
    outstanding: int = Field(description="requests that it has now", examples=[2])
    schema_: str | None = Field(
        alias="schema",
        description="how it takes the schema of a proposal: `regex`, `grammar`, `json_schema`, or "
        "`prompt` if only the prompt can ask for it",
        examples=["regex"],
    )
    scores: Literal["decisions", "logprobs", "text"] | None = Field(
        description="how answers are scored: by `decisions`, by `logprobs`, or by `text`, which is "
        "never reliable",
        examples=["decisions"],
    )
    top_logprobs: int | None = Field(
        description="the number of most likely tokens whose log probabilities it returns",
        examples=[20],
    )
    adapters: bool | None = Field(
        description="whether it loads LoRA adapters at run time", examples=[True]
    )
    decisions_refused: int = Field(
        description="questions that it did not answer by `/v1/decisions`, so that they were scored "
        "by `logprobs` or `text`",
        examples=[0],
    )


class ReplicaHealth(BaseModel):
    """One of several replicas of a model: a worker process."""

    state: Literal["unloaded", "loading", "ready", "failed"] = Field(
        description="`unloaded`, `loading`, `ready` or `failed`, as of a model",
        examples=["failed"],
    )
    reason: str | None = Field(
        description="why it failed; null if it has not", examples=[_REPLICA["reason"]]
    )
    adapter: str | None = Field(
        description="the name of its adapter; during a swap, replicas have different ones",
        examples=[_REPLICA["adapter"]],
    )
    pid: int | None = Field(
        description="its process id; null while it does not run", examples=[4712]
    )
    restarts: int = Field(
        description="how many times it died or could not be started", examples=[1]
    )


class ModelHealth(BaseModel):
    """A model and its worker processes."""

    state: Literal["unloaded", "loading", "ready", "failed"] = Field(
        description="`unloaded`: the first request loads it; `loading`: it will answer soon; "
        "`ready`: it answers; `failed`: its files are missing or it cannot be loaded, see "
        "`reason`",
        examples=["ready"],
    )
    reason: str | None = Field(
        description="why it failed, and what to set; null if it has not",
        examples=["HERMES_MODEL_PATH: no such folder."],
    )
    model: str | None = Field(
        description="its name, as in `X-Model`; null while it is not loaded",
        examples=[_MODEL["model"]],
    )
    adapter: str | None = Field(
        description="the name of its adapter; null without one", examples=[_MODEL["adapter"]]
    )
    runtime: str | None = Field(
        description="the library that runs it; null while it is not loaded",
        examples=[_MODEL["runtime"]],
    )
    device: str | None = Field(
        description="what it runs on, `cpu` or `cuda`; null while it is not loaded",
        examples=["cpu"],
    )
    pid: int | None = Field(
        description="the process id of its worker, or of the first one that serves if there are "
        "several; null while there is none",
        examples=[4711],
    )
    restarts: int = Field(
        description="how many times its workers died or could not be started", examples=[0]
    )
    completion_tokens_total: int = Field(
        description="tokens that it has generated since the server started", examples=[18230]
    )
    requests: int = Field(description="requests that run or wait now", examples=[3])
    queue_length: int = Field(
        description="how many requests may run and wait; further ones get 429",
        examples=[64],
    )
    running: int = Field(description="requests that run now", examples=[2])
    speed: ModelSpeed | None = Field(
        description="its speed; null while it is not loaded, or if it was not measured",
        examples=[_MODEL["speed"]],
    )
    notes: list[str] = Field(
        description="where the sidecar deviates from the model's files, one sentence each",
        examples=[[]],
    )
    servers: list[ServerHealth] = Field(
        description="the servers that have it; empty if it runs on this machine",
        examples=[[_SERVER]],
    )
    replicas: list[ReplicaHealth] = Field(
        description="its replicas, if `PHI3_REPLICAS` or `HERMES_REPLICAS` is more than 1",
        examples=[[_REPLICA]],
    )


class ForecastHealth(BaseModel):
    """How long the longest proposal for a typical context will take on an idle machine, from the
    measured speeds of the models; null while a speed is unknown."""

    proposal_seconds: float | None = Field(description="Phi-3's proposal", examples=[3.962])
    critique_seconds: float | None = Field(description="Hermes' critique", examples=[4.301])
    score_seconds: float | None = Field(
        description="Hermes' score after the critique", examples=[0.145]
    )
    timeout_seconds: float = Field(description="`REQUEST_TIMEOUT_SECONDS`", examples=[60.0])
    warning: str | None = Field(
        description="what to set, if the sum is longer than the timeout; null if it is not",
        examples=[
            "A proposal with its critique and score takes about 81 s, longer than "
            "REQUEST_TIMEOUT_SECONDS=60; set it to 110, or use smaller models."
        ],
    )


class InboxHealth(BaseModel):
    """The inbox, in which other services leave feedback; counts are since the server started."""

    pending: int = Field(
        description="entries that a sidecar has read and not stored yet", examples=[0]
    )
    dead: int = Field(
        description="dead letters: entries that no sidecar could store; `GET /events/dead` lists "
        "them",
        examples=[1],
    )
    handled: int = Field(description="entries that this sidecar stored", examples=[230])
    claimed: int = Field(
        description="entries that this sidecar claimed from a dead one", examples=[0]
    )
    failures: int = Field(description="failed attempts to store entries", examples=[0])


class EventBusHealth(BaseModel):
    """The connection to Redis; counts are since the server started."""

    connected: bool = Field(description="whether Redis can be reached now", examples=[True])
    url: str = Field(
        description="`REDIS_URL`, without its password", examples=["redis://localhost:6379/0"]
    )
    outages: int = Field(description="how often the connection was lost", examples=[0])
    seconds_away: float = Field(description="total seconds without a connection", examples=[0.0])
    published: int = Field(description="events that were published", examples=[1200])
    published_late: int = Field(
        description="of these, events that were published after an outage", examples=[0]
    )
    waiting: int = Field(
        description="messages that wait for Redis in memory; events wait in the journal",
        examples=[0],
    )
    unpublished: int = Field(description="messages that were never published", examples=[0])
    oldest_seconds: float = Field(
        description="age of the oldest event that waits for Redis; 0 if none waits", examples=[0.0]
    )
    failing: str | None = Field(
        description="why Redis accepts no events although it is connected; null if it accepts them",
        examples=["You can't write against a read only replica."],
    )
    handler_errors: int = Field(description="messages whose handler raised an error", examples=[0])
    refused: int = Field(
        description="messages of other services that were invalid and refused", examples=[0]
    )
    dropped: int = Field(
        description="messages that were dropped because listeners were too slow", examples=[0]
    )
    pauses: int = Field(
        description="how often the bus stopped reading because the queue of a handler was full",
        examples=[0],
    )
    denied: list[str] = Field(
        description="operations that the access rules of Redis deny to the sidecar",
        examples=[["PUBLISH audio.bytes"]],
    )
    warnings: list[str] = Field(
        description="options with which this Redis may lose acknowledged writes",
        examples=[["appendonly of Redis is no, not yes: a restart of Redis loses everything"]],
    )
    inbox: InboxHealth | None = Field(
        description="the inbox; null with `memory://`, which has no inbox",
        examples=[_INBOX],
    )
    listeners: int = Field(description="clients that listen to `/events/` now", examples=[2])


class JournalHealth(BaseModel):
    """The journal, which all processes of this machine share: what waits for LanceDB and Redis."""

    accepts_rows: bool = Field(
        description="whether it accepts rows now, even if the database is unavailable",
        examples=[True],
    )
    rows: int = Field(description="rows that LanceDB does not have yet", examples=[2])
    bytes: int = Field(description="their bytes", examples=[1480])
    most_bytes: int = Field(
        description="bytes that it can hold; further rows are refused", examples=[67108864]
    )
    oldest_seconds: float = Field(
        description="age of the oldest row; 0 if there is none", examples=[0.4]
    )
    events: int = Field(description="events that Redis does not have yet", examples=[1])
    event_bytes: int = Field(description="their bytes", examples=[612])
    oldest_event_seconds: float = Field(
        description="age of the oldest event; 0 if there is none", examples=[0.1]
    )
    events_dropped: int = Field(
        description="events that this sidecar dropped, because there were too many or they were "
        "too old",
        examples=[0],
    )
    requests: int = Field(
        description="requests with an `Idempotency-Key` in the journal", examples=[40]
    )
    request_bytes: int = Field(description="their bytes", examples=[51200])
    requests_dropped: int = Field(
        description="requests that this sidecar dropped early, because there were too many",
        examples=[0],
    )


class DatabaseHealth(BaseModel):
    """The database and its journal; counts are since the server started."""

    state: Literal["opening", "open", "away", "closed"] = Field(
        description="`opening`: not yet open; `open`: rows are written; `away`: it cannot be "
        "opened or written, see `reason`, and rows wait in the journal; `closed`: the server is "
        "shutting down",
        examples=["open"],
    )
    reason: str | None = Field(
        description="why it is away, or why the journal failed; null if neither",
        examples=["The folder of LANCEDB_URI cannot be written."],
    )
    uri: str = Field(description="`LANCEDB_URI`, without secrets", examples=["/app/lancedb_data"])
    rows_written: int = Field(description="rows that were acknowledged", examples=[5310])
    rows_waiting: int = Field(
        description="rows in the journal that LanceDB does not have yet", examples=[2]
    )
    journal: JournalHealth = Field(description="the journal", examples=[_JOURNAL])
    fragments: dict[str, int] = Field(
        description="the number of fragments of each table; compaction keeps it low",
        examples=[{"proposals": 3}],
    )
    last_compaction: str | None = Field(
        description="when the tables were last compacted, ISO 8601 in UTC; null if they were not",
        examples=[_DATABASE["last_compaction"]],
    )
    compaction_failure: str | None = Field(
        description="why the last compaction failed; null if it did not",
        examples=["disk full"],
    )
    compaction_failures: int = Field(description="compactions that failed", examples=[0])
    repairs: list[str] = Field(
        description="the latest repairs after a crash, one sentence each",
        examples=[["proposals: a manifest of no bytes was set aside."]],
    )


class VoiceWorker(BaseModel):
    """A worker that speaks for this sidecar."""

    worker_id: str = Field(description="its name", examples=["gpu-1-8c2f61d0"])
    seconds_ago: float = Field(description="since its last heartbeat", examples=[0.8])


class SpeechHealth(BaseModel):
    """The voice and its listeners; counts are since the server started."""

    state: Literal["ready", "unavailable"] = Field(
        description="`ready`: `/speak` answers; `unavailable`: there is no voice, see `reason`",
        examples=["ready"],
    )
    reason: str | None = Field(
        description="why there is no voice, and what to set; null if there is one",
        examples=["TTS_VOICE=chatterbox needs a worker, and none is there."],
    )
    voice: str | None = Field(
        description="the voice of the next text, as in `X-Voice`; null if there is none",
        examples=["piper"],
    )
    waiting: int = Field(description="texts that are being spoken or wait now", examples=[0])
    spoken: int = Field(description="texts that were spoken", examples=[17])
    workers: list[VoiceWorker] = Field(
        description="the Chatterbox workers on the same Redis", examples=[[_WORKER]]
    )
    queued: int = Field(
        description="texts of all sidecars that the workers have not finished", examples=[0]
    )
    listeners: int = Field(description="clients that listen to `/stream/audio` now", examples=[1])
    lost: int = Field(
        description="WAVs that listeners missed because they were too slow", examples=[0]
    )


class HealthSummary(BaseModel):
    """The overall state. If the server has API keys, a request without one gets only this."""

    status: Literal["ok", "partial_error", "error"] = Field(
        description="`ok`: every component works; `partial_error`: some requests fail, or an "
        "optional component does not work; `error`: no model can answer",
        examples=["ok"],
    )


class Health(HealthSummary):
    """The overall state and the state of each component."""

    version: str = Field(description="the sidecar's version", examples=["0.2.0"])
    uptime_seconds: float = Field(
        ge=0, description="seconds since the server started", examples=[86400.5]
    )
    hermes_loaded: bool = Field(description="whether Hermes is in memory", examples=[True])
    phi3_loaded: bool = Field(description="whether Phi-3 is in memory", examples=[True])
    phi3_model_file_exists: bool = Field(
        description="whether Phi-3's model file exists", examples=[True]
    )
    device: str = Field(
        description="what Phi-3 runs on: `cpu` or `cuda`; the configured device while it is not "
        "loaded",
        examples=["cpu"],
    )
    phi3_adapter_date: str | None = Field(
        description="the date of the adapter in use, `YYYY-MM-DD`; null without one",
        examples=["2026-01-31"],
    )
    phi3_adapter_problem: str | None = Field(
        description="why this sidecar keeps another adapter than the other sidecars of its Redis; "
        "null if all use the same",
        examples=[
            "PHI3_ADAPTER_DIR does not hold the adapter 20260131, which the other sidecars use."
        ],
    )
    mean_hermes_score_last_24h: float | None = Field(
        description="the mean of Hermes' scores of the last 24 hours, 0 to 1; null without any",
        examples=[0.71],
    )
    num_hermes_scores_last_24h: int = Field(
        description="the number of Hermes' scores of the last 24 hours", examples=[42]
    )
    models: dict[str, ModelHealth] = Field(
        description="each model by its name: `phi3` and `hermes`"
    )
    forecast: ForecastHealth = Field(description="what a proposal will take")
    event_bus: EventBusHealth = Field(description="the connection to Redis")
    database: DatabaseHealth = Field(description="the database and its journal")
    speech: SpeechHealth = Field(description="the voice and its listeners")


class Probe(BaseModel):
    """The answer of a probe."""

    status: Literal["ok", "unavailable", "draining"] = Field(
        description="`ok`: send requests; `unavailable`: a component is missing; `draining`: the "
        "server is shutting down",
        examples=["ok"],
    )
    missing: list[str] = Field(
        [],
        description="the components without which requests fail: `phi3`, `hermes`, `database`",
        examples=[["hermes"]],
    )
    reasons: dict[str, str] | None = Field(
        None,
        description="the reason for each missing component; absent if nothing is missing, or if "
        "the server has API keys and the request has none",
        examples=[{"hermes": "The hermes model is still loading."}],
    )

"""The groups of the settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SecretStr

from llm_sidecar.logs import LogFormat
from llm_sidecar.settings.base import Group
from llm_sidecar.settings.values import (
    ApiKeys,
    HostNames,
    HttpUrl,
    Name,
    Origins,
    QueueLength,
    RedisUrl,
    Replicas,
    Seconds,
    SentryDsn,
    ServerKey,
    ServerUrls,
    Share,
    Switch,
    Temperature,
    Threads,
    Timeout,
    integer,
)

DEFAULT_PHI3: Final = Path("/app/models/llm_micro/phi3.onnx")
DEFAULT_HERMES: Final = Path("/app/hermes-model")
DEFAULT_LANCEDB_URI: Final = "/app/lancedb_data"


def _threads(replicas: str) -> Callable[[dict[str, Any]], int]:
    """The default number of threads of a replica: two models share the cores that this process may
    use, and the replicas of a model share its half."""
    return lambda data: max(1, len(os.sched_getaffinity(0)) // 2 // data.get(replicas, 1))


class Models(Group):
    """Where the models are, and how they load and run."""

    phi3_path: Path | None = Field(
        None,
        alias="MICRO_LLM_MODEL_PATH",
        description="the path of the Phi-3 model: an .onnx file beside its genai_config.json, a "
        "folder, or a .gguf file",
    )
    """The model that writes proposals. Unset: `/app/models/llm_micro/phi3.onnx`."""
    hermes_path: Path | None = Field(
        None, alias="HERMES_MODEL_PATH", description="the path of the Hermes folder or .gguf file"
    )
    """The model that criticises and scores. Unset: `/app/hermes-model`."""
    phi3_urls: ServerUrls = Field((), alias="PHI3_URL")
    """Servers that speak OpenAI's protocol and have Phi-3, instead of a model on this machine."""
    phi3_remote_model: str | None = Field(
        None, alias="PHI3_REMOTE_MODEL", description="the name of a model on the servers"
    )
    """What the servers of `PHI3_URL` call Phi-3. Unset: `phi3`, or the only model that they
    list."""
    phi3_remote_key: ServerKey | None = Field(
        None, alias="PHI3_REMOTE_KEY", description="a key of visible ASCII characters"
    )
    """The API key of the servers of `PHI3_URL`."""
    hermes_urls: ServerUrls = Field((), alias="HERMES_URL")
    """Servers that speak OpenAI's protocol and have Hermes, instead of a model on this machine."""
    hermes_remote_model: str | None = Field(
        None, alias="HERMES_REMOTE_MODEL", description="the name of a model on the servers"
    )
    """What the servers of `HERMES_URL` call Hermes. Unset: `hermes`, or the only model that they
    list."""
    hermes_remote_key: ServerKey | None = Field(
        None, alias="HERMES_REMOTE_KEY", description="a key of visible ASCII characters"
    )
    """The API key of the servers of `HERMES_URL`."""
    adapter_dir: Path = Field(
        Path("/app/models/phi3/adapters"),
        alias="PHI3_ADAPTER_DIR",
        description="the path of a folder of dated adapters",
    )
    """Where `/adapters/swap` looks for LoRA adapters of Phi-3."""
    demo: Switch = Field(False, alias="SIDECAR_DEMO")
    """Whether a demo model replaces a model that is neither configured nor at its default path."""
    preload: Switch = Field(False, alias="PRELOAD_MODELS")
    """Whether models load when the server starts. If not, the first request loads them."""
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", alias="DEVICE", description="auto, cpu or cuda"
    )
    """Where models run. `auto` uses CUDA if the model's runtime supports it, else the CPU."""
    llama_server: Path | None = Field(
        None, alias="LLAMA_SERVER", description="the path or the name of a llama-server program"
    )
    """What runs `.gguf` files. Unset: `llama-server` on the PATH, else the wheel `xllamacpp`."""
    phi3_replicas: Replicas = Field(1, alias="PHI3_REPLICAS")
    """The number of workers with Phi-3, each with the whole model in its memory."""
    hermes_replicas: Replicas = Field(1, alias="HERMES_REPLICAS")
    """The number of workers with Hermes, each with the whole model in its memory."""
    phi3_threads: Threads = Field(default_factory=_threads("phi3_replicas"), alias="PHI3_THREADS")
    """CPU threads of each worker with Phi-3. Unset: half of the cores, divided by the workers."""
    hermes_threads: Threads = Field(
        default_factory=_threads("hermes_replicas"), alias="HERMES_THREADS"
    )
    """CPU threads of each worker with Hermes. Unset: half of the cores, divided by the workers."""
    hermes_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", alias="HERMES_DTYPE", description="auto, bfloat16 or float32"
    )
    """The precision of Hermes on PyTorch. `auto`: bfloat16 if the CPU has instructions for it."""
    prefill_dtype: Literal["auto", "bfloat16", "off"] = Field(
        "auto", alias="PREFILL_DTYPE", description="auto, bfloat16 or off"
    )
    """Whether PyTorch does the prefill of an ONNX model. `auto`: if that is faster."""
    phi3_temperature: Temperature = Field(0.0, alias="PHI3_TEMPERATURE")
    """The sampling temperature of proposals."""
    hermes_temperature: Temperature | None = Field(
        None, alias="HERMES_TEMPERATURE", description="a number from 0 (greedy) to 2"
    )
    """The sampling temperature of Hermes' texts. Unset: the sampling in the model's own files.
    Scores do not depend on it."""
    critique_max_tokens: Annotated[int, integer(1, 4096)] = Field(96, alias="CRITIQUE_MAX_TOKENS")
    """The maximum number of tokens of a critique. A smaller `max_length` of a request wins."""
    min_answer_mass: Share = Field(0.5, alias="MIN_ANSWER_MASS")
    """The minimum total probability of the answers 0 to 10. Below it, a score is
    marked as unreliable and left out of means and training data."""
    load_wait: Seconds | None = Field(
        None, alias="MODEL_LOAD_WAIT_SECONDS", description="seconds from 0 to 3600"
    )
    """The longest wait for a model that is loading. Unset: until the deadline of the request."""
    load_timeout: Timeout = Field(300.0, alias="MODEL_LOAD_TIMEOUT_SECONDS")
    """How long a model may load. After that its worker is stopped and started again."""


class Proposals(Group):
    """How Phi-3 writes a proposal."""

    few_shot_examples: int | None = Field(
        None,
        alias="FEW_SHOT_EXAMPLES",
        ge=0,
        le=16,
        description="an integer from 0 to 16; unset: 3, and 0 where Phi-3 is the demo model",
    )
    """The maximum number of corrections that Phi-3 sees as examples."""
    examples_from_bus: Switch = Field(False, alias="EXAMPLES_FROM_BUS")
    """Whether corrections that other services publish on Redis become examples."""
    grounding: Literal["report", "retry"] = Field(
        "report", alias="GROUNDING", description="report or retry"
    )
    """`report` only reports ungrounded proposals. `retry` also generates them once more."""


class Limits(Group):
    """Bounds of requests, connections and waiting."""

    request_timeout: Timeout = Field(60.0, alias="REQUEST_TIMEOUT_SECONDS")
    """The deadline of one request, including all its model calls."""
    queue_length: QueueLength = Field(64, alias="QUEUE_LENGTH")
    """The maximum number of requests of one model, running and waiting. Further ones get 429."""
    max_concurrent_requests: Annotated[int, integer(1, 100_000)] = Field(
        256, alias="MAX_CONCURRENT_REQUESTS"
    )
    """The maximum number of running requests in the server. Further ones get 429."""
    max_connections: Annotated[int, integer(1, 100_000)] = Field(1000, alias="MAX_CONNECTIONS")
    """The maximum number of connections. Further ones get only probes and `/metrics`."""
    header_timeout: Timeout = Field(15.0, alias="HEADER_TIMEOUT_SECONDS")
    """How long a client may take to send a request's headers. Then its connection is closed."""
    send_timeout: Timeout = Field(20.0, alias="SEND_TIMEOUT_SECONDS")
    """How long a client may read nothing of its answer. Then its connection is reset."""
    max_body_bytes: Annotated[int, integer(1024, 1 << 30)] = Field(1 << 20, alias="MAX_BODY_BYTES")
    """The largest request body. A larger one gets 413. `/speak` always takes 14 MiB."""
    body_timeout: Timeout = Field(10.0, alias="BODY_TIMEOUT_SECONDS")
    """How long a client may take to send a request's body. After that it gets 408."""
    max_prompt_chars: Annotated[int, integer(1, 1 << 24)] = Field(32_768, alias="MAX_PROMPT_CHARS")
    """The longest text, and the longest object as JSON, in characters."""
    shutdown_grace: Seconds = Field(10.0, alias="SHUTDOWN_GRACE_SECONDS")
    """How long running requests may take to finish at shutdown."""
    shutdown_drain: Seconds = Field(0.5, alias="SHUTDOWN_DRAIN_SECONDS")
    """How long the socket stays open at shutdown, at least, so that load balancers notice."""


class Access(Group):
    """Who may call the server."""

    api_keys: ApiKeys = Field((), alias="SIDECAR_API_KEYS")
    """If set, a request needs one of these keys. The log and feedback have the name of the key."""
    metrics_need_key: Switch = Field(False, alias="METRICS_NEED_KEY")
    """Whether `/metrics` needs an API key too."""
    allowed_hosts: HostNames = Field((), alias="ALLOWED_HOSTS")
    """Host names that a request may ask for, against DNS rebinding. Unset: all names."""
    cors_origins: Origins = Field((), alias="CORS_ORIGINS")
    """Origins whose web pages may call the server."""


class Database(Group):
    """Where rows are stored."""

    uri: str = Field(
        DEFAULT_LANCEDB_URI,
        alias="LANCEDB_URI",
        description="a folder or an s3:// address",
        min_length=1,
    )
    """The database. Credentials of `s3://` come from the usual AWS variables."""
    log_dir: Path = Field(
        Path("/app/lancedb_log"),
        alias="LANCEDB_LOG_DIR",
        description="the path of a folder, for the journal of a database on an s3:// address",
    )
    """The journal of a database on `s3://`. A local database has it in its own folder."""
    s3_endpoint: str | None = Field(None, alias="AWS_ENDPOINT_URL_S3", description="a URL")
    """The endpoint of an object store other than Amazon's."""
    aws_endpoint: str | None = Field(None, alias="AWS_ENDPOINT_URL", description="a URL")
    """The endpoint, if `AWS_ENDPOINT_URL_S3` is unset."""


class Events(Group):
    """The event bus."""

    url: RedisUrl = Field(SecretStr("redis://localhost:6379/0"), alias="REDIS_URL")
    """The event bus. `memory://` is a bus inside the process, which needs no Redis."""
    stream: Annotated[str, Field(min_length=1)] = Field(
        "osiris.events", alias="EVENT_STREAM", description="the name of a Redis stream"
    )
    """The Redis stream that keeps the events."""
    stream_maxlen: Annotated[int, integer(1, 1 << 40)] = Field(100_000, alias="EVENT_STREAM_MAXLEN")
    """About how many events the stream keeps. With `memory://`, at most 1,000."""
    max_listeners: QueueLength = Field(64, alias="MAX_EVENT_LISTENERS")
    """The maximum number of listeners of `/events/`. Further ones get 429."""


class Speech(Group):
    """Who speaks, and how many texts and listeners at once."""

    voice: Literal["auto", "chatterbox", "piper", "espeak"] = Field(
        "auto", alias="TTS_VOICE", description="auto, chatterbox, piper or espeak"
    )
    """The voice. `auto` uses a Chatterbox worker if there is one, else Piper if it is installed,
    else espeak-ng."""
    queue_length: QueueLength = Field(64, alias="TTS_QUEUE_LENGTH")
    """The maximum number of texts, spoken and waiting. Further ones get 429."""
    timeout: Timeout = Field(120.0, alias="TTS_TIMEOUT_SECONDS")
    """The deadline of one text. After that `/speak` answers 504."""
    max_listeners: QueueLength = Field(64, alias="MAX_AUDIO_LISTENERS")
    """The maximum number of listeners of `/stream/audio`. Further ones get 429."""
    chatterbox_dir: Path = Field(
        Path("/models/tts/chatterbox"),
        alias="CHATTERBOX_MODEL_DIR",
        description="the path of the folder of the Chatterbox weights",
    )
    """The model of a Chatterbox worker."""


class Telemetry(Group):
    """Metrics, log lines, traces, reported errors and profiles."""

    metrics: Switch = Field(False, alias="ENABLE_METRICS")
    """Whether `/metrics` serves Prometheus metrics. If not, it answers 404."""
    log_format: LogFormat = Field("auto", alias="LOG_FORMAT", description="auto, json or text")
    """The format of log lines. `auto` is text on a terminal, else JSON."""
    otel_endpoint: HttpUrl | None = Field(
        None,
        alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="the http:// or https:// URL of an OTLP receiver",
    )
    """Where traces go, over HTTP. Unset: no traces."""
    otel_service_name: Name = Field("osiris_llm_sidecar", alias="OTEL_SERVICE_NAME")
    """The name of the service in traces."""
    sentry_dsn: SentryDsn = Field(SecretStr(""), alias="SENTRY_DSN")
    """Where unexpected errors are reported. Unset: nowhere."""
    sentry_env: str | None = Field(None, alias="SENTRY_ENV", description="a name")
    """The name of the environment in Sentry. Unset: Sentry's own default, `production`."""
    sentry_traces_sample_rate: Share = Field(0.0, alias="SENTRY_TRACES_SAMPLE_RATE")
    """The share of requests whose durations are sent to Sentry."""
    profiling: Switch = Field(False, alias="ENABLE_PROFILING")
    """Whether `/debug/prof` shows profiles of requests. If not, it answers 404."""

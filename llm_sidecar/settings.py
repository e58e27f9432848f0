"""Every environment variable, in one frozen object."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

from llm_sidecar.api_keys import KEYS_DESCRIPTION, ApiKey, parse_api_keys
from llm_sidecar.errors import SettingsError
from llm_sidecar.host_names import allowed_host
from llm_sidecar.logs import LogFormat

_REDIS_SCHEMES = ("redis", "rediss", "unix", "memory")
DEFAULT_PHI3 = Path("/app/models/llm_micro/phi3.onnx")
DEFAULT_LANCEDB_URI = "/app/lancedb_data"
DEFAULT_LANCEDB_LOG_DIR = Path("/app/lancedb_log")
DEFAULT_HERMES = Path("/app/hermes-model")


_ORIGIN: Final = re.compile(r"\*|https?://[^\s/?#@*]+")


def _split(value: object) -> object:
    """The parts of a comma-separated variable, the empty ones too."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _cores_per_model() -> int:
    """Two models share the machine, so each gets half of the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


class Settings(BaseModel):
    """The configuration of one sidecar.

    A field's alias is the environment variable, its description says which values it takes, and
    the string below it what it means: docs/configuration.md is generated from all three.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)

    phi3_path: Path | None = Field(
        None,
        alias="MICRO_LLM_MODEL_PATH",
        description="the path of the Phi-3 model file, beside its genai_config.json",
    )
    """The model that writes proposals. Unset: `/app/models/llm_micro/phi3.onnx`."""
    hermes_path: Path | None = Field(
        None, alias="HERMES_MODEL_PATH", description="the path of the Hermes folder"
    )
    """The model that criticises and scores. Unset: `/app/hermes-model`."""
    adapter_dir: Path = Field(
        Path("/app/models/phi3/adapters"),
        alias="PHI3_ADAPTER_DIR",
        description="the path of a folder of dated adapters",
    )
    """Where `/adapters/swap` looks for LoRA adapters of Phi-3."""
    chatterbox_dir: Path = Field(
        Path("/models/tts/chatterbox"),
        alias="CHATTERBOX_MODEL_DIR",
        description="the path of the folder of the Chatterbox weights",
    )
    """The model of a Chatterbox worker."""
    redis_url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"),
        alias="REDIS_URL",
        description="a redis://, rediss:// or unix:// URL, or memory://",
    )
    """The event bus. `memory://` is a bus inside the process, which needs no Redis."""
    lancedb_uri: str = Field(
        DEFAULT_LANCEDB_URI,
        alias="LANCEDB_URI",
        description="a folder or an s3:// address",
        min_length=1,
    )
    """The database. Credentials of `s3://` come from the usual AWS variables."""
    lancedb_log_dir: Path = Field(
        DEFAULT_LANCEDB_LOG_DIR,
        alias="LANCEDB_LOG_DIR",
        description="the path of a folder, for the log of a database on an s3:// address",
    )
    """The write-ahead log of a database on `s3://`. A local database has it in its own folder."""
    demo: bool = Field(False, alias="SIDECAR_DEMO", description="true or false")
    """Whether a demo model replaces a model that is neither configured nor at its default path."""
    preload: bool = Field(False, alias="PRELOAD_MODELS", description="true or false")
    """Whether models load when the server starts. If not, the first request loads them."""
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", alias="DEVICE", description="auto, cpu or cuda"
    )
    """Where models run. `auto` uses CUDA if the model's runtime supports it, else the CPU."""
    phi3_threads: int = Field(
        default_factory=_cores_per_model,
        alias="PHI3_THREADS",
        ge=1,
        le=1024,
        description="an integer from 1 to 1024",
    )
    """CPU threads of Phi-3's runtime. Unset: half of the cores."""
    hermes_threads: int = Field(
        default_factory=_cores_per_model,
        alias="HERMES_THREADS",
        ge=1,
        le=1024,
        description="an integer from 1 to 1024",
    )
    """CPU threads of Hermes' runtime. Unset: half of the cores."""
    phi3_temperature: float = Field(
        0.0,
        alias="PHI3_TEMPERATURE",
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="a number from 0 (greedy) to 2",
    )
    """The sampling temperature of proposals."""
    hermes_temperature: float = Field(
        0.0,
        alias="HERMES_TEMPERATURE",
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="a number from 0 (greedy) to 2",
    )
    """The sampling temperature of Hermes' texts. Scores do not depend on it."""
    few_shot_examples: int | None = Field(
        None,
        alias="FEW_SHOT_EXAMPLES",
        ge=0,
        le=16,
        description="an integer from 0 to 16; unset: 3, and 0 where Phi-3 is the demo model",
    )
    """The maximum number of corrections that Phi-3 sees as examples."""
    grounding: Literal["report", "retry"] = Field(
        "report", alias="GROUNDING", description="report or retry"
    )
    """`report` only reports ungrounded proposals. `retry` also generates them once more."""
    examples_from_bus: bool = Field(False, alias="EXAMPLES_FROM_BUS", description="true or false")
    """Whether corrections that other services publish on Redis become examples."""
    queue_length: int = Field(
        64,
        alias="QUEUE_LENGTH",
        ge=1,
        le=10_000,
        description="an integer from 1 to 10000",
    )
    """The maximum number of requests of one model, running and waiting. Further ones get 429."""
    request_timeout: float = Field(
        60.0,
        alias="REQUEST_TIMEOUT_SECONDS",
        gt=0,
        le=3600,
        description="seconds, above 0 up to 3600",
    )
    """The deadline of one request, for all its model calls together."""
    load_wait: float | None = Field(
        None,
        alias="MODEL_LOAD_WAIT_SECONDS",
        ge=0,
        le=3600,
        description="seconds from 0 to 3600",
    )
    """The longest wait for a model that is loading. Unset: until the deadline of the request."""
    load_timeout: float = Field(
        300.0,
        alias="MODEL_LOAD_TIMEOUT_SECONDS",
        gt=0,
        le=3600,
        description="seconds, above 0 up to 3600",
    )
    """How long a model may load. After that its worker is stopped and started again."""
    tts_voice: Literal["auto", "espeak", "chatterbox"] = Field(
        "auto", alias="TTS_VOICE", description="auto, espeak or chatterbox"
    )
    """The voice. `auto` uses a Chatterbox worker if there is one, else espeak-ng."""
    tts_queue_length: int = Field(
        64,
        alias="TTS_QUEUE_LENGTH",
        ge=1,
        le=10_000,
        description="an integer from 1 to 10000",
    )
    """The maximum number of texts, spoken and waiting. Further ones get 429."""
    tts_timeout: float = Field(
        120.0,
        alias="TTS_TIMEOUT_SECONDS",
        gt=0,
        le=3600,
        description="seconds, above 0 up to 3600",
    )
    """The deadline of one text. After that `/speak` answers 504."""
    max_audio_listeners: int = Field(
        64,
        alias="MAX_AUDIO_LISTENERS",
        ge=1,
        le=10_000,
        description="an integer from 1 to 10000",
    )
    """The maximum number of listeners of `/stream/audio`. Further ones get 429."""
    shutdown_grace: float = Field(
        10.0,
        alias="SHUTDOWN_GRACE_SECONDS",
        ge=0,
        le=3600,
        description="seconds from 0 to 3600",
    )
    """How long running requests may take to finish at shutdown."""
    enable_metrics: bool = Field(False, alias="ENABLE_METRICS", description="true or false")
    """Whether `/metrics` serves Prometheus metrics. If not, it answers 404."""
    max_body_bytes: int = Field(
        1 << 20,
        alias="MAX_BODY_BYTES",
        ge=1024,
        le=1 << 30,
        description="an integer from 1024 to 1073741824",
    )
    """The largest request body. A larger one gets 413. `/speak` always takes 14 MiB."""
    profiling: bool = Field(False, alias="ENABLE_PROFILING", description="true or false")
    """Whether `/debug/prof` shows profiles of requests. If not, it answers 404."""
    otel_endpoint: str | None = Field(
        None,
        alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="the http:// or https:// URL of an OTLP receiver",
    )
    """Where traces go, over HTTP. Unset: no traces."""
    otel_service_name: str = Field(
        "osiris_llm_sidecar", alias="OTEL_SERVICE_NAME", description="a name"
    )
    """The name of the service in traces."""
    sentry_dsn: SecretStr = Field(
        SecretStr(""), alias="SENTRY_DSN", description="https://KEY@HOST/PROJECT"
    )
    """Where unexpected errors are reported. Unset: nowhere."""
    sentry_env: str | None = Field(None, alias="SENTRY_ENV", description="a name")
    """The name of the environment in Sentry. Unset: Sentry's own default, `production`."""
    sentry_traces_sample_rate: float = Field(
        0.0,
        alias="SENTRY_TRACES_SAMPLE_RATE",
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="a number from 0 to 1",
    )
    """The share of requests whose durations are sent to Sentry."""

    max_prompt_chars: int = Field(
        32_768,
        alias="MAX_PROMPT_CHARS",
        ge=1,
        le=1 << 24,
        description="an integer from 1 to 16777216",
    )
    """The longest text, and the longest object as JSON, in characters."""
    max_concurrent_requests: int = Field(
        256,
        alias="MAX_CONCURRENT_REQUESTS",
        ge=1,
        le=100_000,
        description="an integer from 1 to 100000",
    )
    """The maximum number of running requests in the server. Further ones get 429."""
    max_connections: int = Field(
        1000,
        alias="MAX_CONNECTIONS",
        ge=1,
        le=100_000,
        description="an integer from 1 to 100000",
    )
    """The maximum number of connections. Further ones get only probes and `/metrics`."""
    header_timeout: float = Field(
        15.0,
        alias="HEADER_TIMEOUT_SECONDS",
        gt=0,
        le=3600,
        description="seconds, above 0 up to 3600",
    )
    """How long a client may take to send a request's headers. Then its connection is closed."""
    send_timeout: float = Field(
        20.0,
        alias="SEND_TIMEOUT_SECONDS",
        gt=0,
        le=3600,
        description="seconds, above 0 up to 3600",
    )
    """How long a client may read nothing of its answer. Then its connection is reset."""
    body_timeout: float = Field(
        10.0,
        alias="BODY_TIMEOUT_SECONDS",
        gt=0,
        le=3600,
        description="seconds, above 0 up to 3600",
    )
    """How long a client may take to send a request's body. After that it gets 408."""
    shutdown_drain: float = Field(
        0.5,
        alias="SHUTDOWN_DRAIN_SECONDS",
        ge=0,
        le=3600,
        description="seconds from 0 to 3600",
    )
    """How long the socket stays open at shutdown, at least, so that load balancers notice."""
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(parse_api_keys)] = Field(
        (), alias="SIDECAR_API_KEYS", description=KEYS_DESCRIPTION
    )
    """If set, a request needs one of these keys. The log and feedback have the name of the key."""
    metrics_need_key: bool = Field(False, alias="METRICS_NEED_KEY", description="true or false")
    """Whether `/metrics` needs an API key too."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (),
        alias="CORS_ORIGINS",
        description="origins such as https://desk.example, separated by commas, or *",
    )
    """Origins whose web pages may call the server."""
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (),
        alias="ALLOWED_HOSTS",
        description="host names such as desk.example or *.desk.example, separated by commas, or *",
    )
    """Host names that a request may ask for, against DNS rebinding. Unset: all names."""
    log_format: LogFormat = Field("auto", alias="LOG_FORMAT", description="auto, json or text")
    """The format of log lines. `auto` is text on a terminal, else JSON."""

    @field_validator("cors_origins")
    @classmethod
    def _known_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_ORIGIN.fullmatch, value)):
            raise ValueError("no origin")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _known_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(allowed_host, value))

    @field_validator("redis_url")
    @classmethod
    def _known_scheme(cls, value: SecretStr) -> SecretStr:
        parts = urlsplit(value.get_secret_value())
        # Reading the port raises ValueError where it is none.
        if parts.scheme not in _REDIS_SCHEMES or parts.port == 0:
            raise ValueError("no URL of a Redis")
        return value

    @field_validator("otel_endpoint")
    @classmethod
    def _http_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("no HTTP URL")
        return value

    @field_validator("sentry_dsn")
    @classmethod
    def _known_project(cls, value: SecretStr) -> SecretStr:
        parts = urlsplit(cls._http_url(value.get_secret_value()))
        if not parts.username or not parts.path.rpartition("/")[2].isdecimal():
            raise ValueError("no DSN")
        return value

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads the variables of `environ` (default: this process's); an empty one counts as unset.

        Raises:
            SettingsError: one line that names the first bad variable, its value and what it takes.
        """
        source = os.environ if environ is None else environ
        known = {str(field.alias): name for name, field in cls.model_fields.items()}
        values: dict[str, Any] = {key: source[key] for key in known if source.get(key)}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            variable = str(error.errors(include_url=False, include_input=False)[0]["loc"][0])
            field = cls.model_fields[known.get(variable, variable)]
            # A Redis URL may hold a password.
            is_secret = any(kind in str(field.annotation) for kind in ("SecretStr", "ApiKey"))
            value = "***" if is_secret else repr(values[variable])
            raise SettingsError(
                f"{variable}={value} is not valid: it takes {field.description}"
            ) from None


def default_max_chars(environ: Mapping[str, str] | None = None) -> int:
    """`MAX_PROMPT_CHARS`, for scripts: no other variable is validated.

    Raises:
        SettingsError: it is not valid.
    """
    source = os.environ if environ is None else environ
    variable = str(Settings.model_fields["max_prompt_chars"].alias)
    given = {variable: source[variable]} if variable in source else {}
    return Settings.from_environ(given).max_prompt_chars

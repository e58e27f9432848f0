"""The settings, from environments that are dicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Le
from pydantic import SecretStr, ValidationError

from llm_sidecar.api_keys import ApiKey
from llm_sidecar.errors import SettingsError
from llm_sidecar.settings import Settings, default_max_chars
from llm_sidecar.settings.values import integer

DEFAULTS: dict[str, object] = {
    "MICRO_LLM_MODEL_PATH": None,
    "HERMES_MODEL_PATH": None,
    "PHI3_URL": (),
    "PHI3_REMOTE_MODEL": None,
    "PHI3_REMOTE_KEY": None,
    "HERMES_URL": (),
    "HERMES_REMOTE_MODEL": None,
    "HERMES_REMOTE_KEY": None,
    "PHI3_ADAPTER_DIR": Path("/app/models/phi3/adapters"),
    "CHATTERBOX_MODEL_DIR": Path("/models/tts/chatterbox"),
    "REDIS_URL": SecretStr("redis://localhost:6379/0"),
    "EVENT_STREAM": "osiris.events",
    "EVENT_STREAM_MAXLEN": 100_000,
    "LANCEDB_URI": "/app/lancedb_data",
    "LANCEDB_LOG_DIR": Path("/app/lancedb_log"),
    "AWS_ENDPOINT_URL_S3": None,
    "AWS_ENDPOINT_URL": None,
    "SIDECAR_DEMO": False,
    "PRELOAD_MODELS": False,
    "DEVICE": "auto",
    "LLAMA_SERVER": None,
    "PHI3_REPLICAS": 1,
    "HERMES_REPLICAS": 1,
    "HERMES_DTYPE": "auto",
    "PREFILL_DTYPE": "auto",
    "PHI3_TEMPERATURE": 0.0,
    "HERMES_TEMPERATURE": None,
    "CRITIQUE_MAX_TOKENS": 96,
    "MIN_ANSWER_MASS": 0.5,
    "FEW_SHOT_EXAMPLES": None,
    "EXAMPLES_FROM_BUS": False,
    "GROUNDING": "report",
    "QUEUE_LENGTH": 64,
    "REQUEST_TIMEOUT_SECONDS": 60.0,
    "MODEL_LOAD_WAIT_SECONDS": None,
    "MODEL_LOAD_TIMEOUT_SECONDS": 300.0,
    "TTS_VOICE": "auto",
    "TTS_QUEUE_LENGTH": 64,
    "TTS_TIMEOUT_SECONDS": 120.0,
    "MAX_AUDIO_LISTENERS": 64,
    "MAX_EVENT_LISTENERS": 64,
    "SHUTDOWN_GRACE_SECONDS": 10.0,
    "ENABLE_METRICS": False,
    "MAX_BODY_BYTES": 1 << 20,
    "ENABLE_PROFILING": False,
    "OTEL_EXPORTER_OTLP_ENDPOINT": None,
    "OTEL_SERVICE_NAME": "osiris_llm_sidecar",
    "SENTRY_DSN": SecretStr(""),
    "SENTRY_ENV": None,
    "SENTRY_TRACES_SAMPLE_RATE": 0.0,
    "MAX_PROMPT_CHARS": 32_768,
    "MAX_CONCURRENT_REQUESTS": 256,
    "MAX_CONNECTIONS": 1000,
    "HEADER_TIMEOUT_SECONDS": 15.0,
    "SEND_TIMEOUT_SECONDS": 20.0,
    "BODY_TIMEOUT_SECONDS": 10.0,
    "SHUTDOWN_DRAIN_SECONDS": 0.5,
    "SIDECAR_API_KEYS": (),
    "METRICS_NEED_KEY": False,
    "CORS_ORIGINS": (),
    "ALLOWED_HOSTS": (),
    "LOG_FORMAT": "auto",
}
BY_CORES = {"PHI3_THREADS", "HERMES_THREADS"}
"""Their defaults follow from the machine."""
BOUNDS: dict[str, tuple[str, str, str, str]] = {
    # variable: a value just below its bounds, the least, the greatest, one just above
    "PHI3_REPLICAS": ("0", "1", "64", "65"),
    "HERMES_REPLICAS": ("0", "1", "64", "65"),
    "PHI3_THREADS": ("0", "1", "1024", "1025"),
    "HERMES_THREADS": ("0", "1", "1024", "1025"),
    "PHI3_TEMPERATURE": ("-0.01", "0", "2", "2.01"),
    "HERMES_TEMPERATURE": ("-0.01", "0", "2", "2.01"),
    "CRITIQUE_MAX_TOKENS": ("0", "1", "4096", "4097"),
    "MIN_ANSWER_MASS": ("-0.01", "0", "1", "1.01"),
    "FEW_SHOT_EXAMPLES": ("-1", "0", "16", "17"),
    "QUEUE_LENGTH": ("0", "1", "10000", "10001"),
    "REQUEST_TIMEOUT_SECONDS": ("0", "0.001", "3600", "3600.1"),
    "MODEL_LOAD_WAIT_SECONDS": ("-0.1", "0", "3600", "3600.1"),
    "MODEL_LOAD_TIMEOUT_SECONDS": ("0", "0.001", "3600", "3600.1"),
    "TTS_QUEUE_LENGTH": ("0", "1", "10000", "10001"),
    "TTS_TIMEOUT_SECONDS": ("0", "0.001", "3600", "3600.1"),
    "MAX_AUDIO_LISTENERS": ("0", "1", "10000", "10001"),
    "MAX_EVENT_LISTENERS": ("0", "1", "10000", "10001"),
    "SHUTDOWN_GRACE_SECONDS": ("-0.1", "0", "3600", "3600.1"),
    "MAX_BODY_BYTES": ("1023", "1024", "1073741824", "1073741825"),
    "SENTRY_TRACES_SAMPLE_RATE": ("-0.01", "0", "1", "1.01"),
    "MAX_PROMPT_CHARS": ("0", "1", "16777216", "16777217"),
    "MAX_CONCURRENT_REQUESTS": ("0", "1", "100000", "100001"),
    "MAX_CONNECTIONS": ("0", "1", "100000", "100001"),
    "HEADER_TIMEOUT_SECONDS": ("0", "0.001", "3600", "3600.1"),
    "SEND_TIMEOUT_SECONDS": ("0", "0.001", "3600", "3600.1"),
    "BODY_TIMEOUT_SECONDS": ("0", "0.001", "3600", "3600.1"),
    "SHUTDOWN_DRAIN_SECONDS": ("-0.1", "0", "3600", "3600.1"),
}
FIELDS = {
    str(field.alias): (group, name, field)
    for group, fields in Settings.groups().items()
    for name, field in fields.model_fields.items()
}


def value(settings: Settings, variable: str) -> object:
    group, name, _ = FIELDS[variable]
    return getattr(getattr(settings, group), name)


def test_every_setting_is_named_here() -> None:
    assert set(FIELDS) == set(DEFAULTS) | BY_CORES


@pytest.mark.parametrize("variable", DEFAULTS)
def test_an_empty_environment_gives_the_documented_default(variable: str) -> None:
    assert value(Settings.from_environ({}), variable) == DEFAULTS[variable]
    assert value(Settings.from_environ({variable: ""}), variable) == DEFAULTS[variable]


@pytest.mark.parametrize(
    ("cores", "threads"), [({0}, 1), ({0, 1}, 1), ({4, 5, 6}, 1), (set(range(16)), 8)]
)
def test_each_model_gets_half_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], threads: int
) -> None:
    asked: list[int] = []

    def affinity(pid: int) -> set[int]:
        asked.append(pid)
        return cores

    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    settings = Settings.from_environ({})
    assert (settings.models.phi3_threads, settings.models.hermes_threads) == (threads, threads)
    # 0 is the process that asks.
    assert asked == [0, 0]


@pytest.mark.parametrize(("replicas", "threads"), [("1", 8), ("3", 2), ("8", 1), ("64", 1)])
def test_the_replicas_of_a_model_share_its_half_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, replicas: str, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    phi3 = Settings.from_environ({"PHI3_REPLICAS": replicas}).models
    assert (phi3.phi3_threads, phi3.hermes_threads) == (threads, 8)
    hermes = Settings.from_environ({"HERMES_REPLICAS": replicas}).models
    assert (hermes.phi3_threads, hermes.hermes_threads) == (8, threads)


@pytest.mark.parametrize("variable", BOUNDS)
def test_a_number_keeps_to_its_bounds(variable: str) -> None:
    below, least, greatest, above = BOUNDS[variable]
    for good in (least, greatest):
        assert value(Settings.from_environ({variable: good}), variable) == float(good)
    for bad in (below, above, "nan", "many"):
        with pytest.raises(SettingsError):
            Settings.from_environ({variable: bad})


def test_the_bounds_of_an_integer_are_inclusive_and_described() -> None:
    field = integer(2, 5)
    assert field.metadata == [Ge(2), Le(5)]
    assert field.description == "an integer from 2 to 5"


def test_variables_are_read_and_others_are_not() -> None:
    settings = Settings.from_environ(
        {"SIDECAR_DEMO": "true", "DEVICE": "", "PHI3_THREADS": "3", "PATH": "/bin", "demo": "false"}
    )
    assert settings.models.demo is True
    assert settings.models.device == "auto"
    assert settings.models.phi3_threads == 3


def test_without_an_environment_the_processs_own_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_LENGTH", "7")
    assert Settings.from_environ().limits.queue_length == 7
    assert Settings.from_environ({}).limits.queue_length == 64


@pytest.mark.parametrize(
    ("variable", "text", "read"),
    [
        ("MICRO_LLM_MODEL_PATH", "/m/phi3.onnx", Path("/m/phi3.onnx")),
        ("PHI3_URL", "http://gpu-1:8000/v1", (SecretStr("http://gpu-1:8000/v1"),)),
        (
            "HERMES_URL",
            "https://desk:pass@a.example, http://[::1]:1/v1/",
            (SecretStr("https://desk:pass@a.example"), SecretStr("http://[::1]:1/v1/")),
        ),
        ("HERMES_REMOTE_KEY", "sk-1", SecretStr("sk-1")),
        ("DEVICE", "cuda", "cuda"),
        ("HERMES_DTYPE", "float32", "float32"),
        ("PREFILL_DTYPE", "off", "off"),
        ("TTS_VOICE", "chatterbox", "chatterbox"),
        ("TTS_VOICE", "piper", "piper"),
        ("LOG_FORMAT", "json", "json"),
        ("REDIS_URL", "memory://", SecretStr("memory://")),
        ("REDIS_URL", "rediss://u:p@h:6380/1", SecretStr("rediss://u:p@h:6380/1")),
        ("REDIS_URL", "unix:///run/redis.sock", SecretStr("unix:///run/redis.sock")),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel:4317", "http://otel:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://otel", "https://otel"),
        ("SENTRY_DSN", "https://key@sentry.example/7", SecretStr("https://key@sentry.example/7")),
        ("SENTRY_DSN", "https://key@h/sentry/7", SecretStr("https://key@h/sentry/7")),
        ("CORS_ORIGINS", "*", ("*",)),
        (
            "CORS_ORIGINS",
            "https://desk.example, http://localhost:3000",
            ("https://desk.example", "http://localhost:3000"),
        ),
        (
            "ALLOWED_HOSTS",
            "Localhost, 127.0.0.1:8000, [::1], *.Desk.Example.",
            ("localhost", "127.0.0.1", "::1", "*.desk.example"),
        ),
        ("ALLOWED_HOSTS", "*, 0:0::1", ("*", "::1")),
        ("SIDECAR_API_KEYS", "!-16-characters-", (ApiKey(SecretStr("!-16-characters-")),)),
    ],
)
def test_a_good_value_is_read(variable: str, text: str, read: object) -> None:
    assert value(Settings.from_environ({variable: text}), variable) == read


def test_settings_given_in_python_may_be_lists_or_by_name() -> None:
    settings = Settings(
        access={"cors_origins": ["https://desk.example"]}, limits={"queue_length": 3}
    )
    assert settings.access.cors_origins == ("https://desk.example",)
    assert settings.limits.queue_length == 3
    with pytest.raises(ValidationError, match="frozen"):
        settings.limits.queue_length = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.limits = settings.limits  # type: ignore[misc]


def test_settings_given_in_python_do_not_read_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUEUE_LENGTH", "7")
    monkeypatch.setenv("queue_length", "7")
    assert Settings().limits.queue_length == 64
    assert Settings(limits={"request_timeout": 3}).limits.queue_length == 64


@pytest.mark.parametrize("unknown", [{"queue_length": 3}, {"limits": {"queue_lenght": 3}}])
def test_settings_given_in_python_have_known_names(unknown: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Settings(**unknown)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DEVICE", "tpu"),
        ("HERMES_DTYPE", "float16"),
        ("PREFILL_DTYPE", "float32"),
        ("SIDECAR_DEMO", "perhaps"),
        ("ENABLE_METRICS", "perhaps"),
        ("QUEUE_LENGTH", "0"),
        ("QUEUE_LENGTH", "many"),
        ("REQUEST_TIMEOUT_SECONDS", "0"),
        ("PHI3_TEMPERATURE", "nan"),
        ("HERMES_TEMPERATURE", "2.5"),
        ("CRITIQUE_MAX_TOKENS", "many"),
        ("MIN_ANSWER_MASS", "half"),
        ("FEW_SHOT_EXAMPLES", "-1"),
        ("EXAMPLES_FROM_BUS", "perhaps"),
        ("GROUNDING", "always"),
        ("MAX_BODY_BYTES", "1e3"),
        ("TTS_VOICE", "siri"),
        ("TTS_TIMEOUT_SECONDS", "0"),
        ("MAX_AUDIO_LISTENERS", "0"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
        ("SENTRY_TRACES_SAMPLE_RATE", "1.5"),
        ("ENABLE_PROFILING", "maybe"),
        ("MAX_PROMPT_CHARS", "0"),
        ("MAX_CONCURRENT_REQUESTS", "-1"),
        ("BODY_TIMEOUT_SECONDS", "0"),
        ("SHUTDOWN_DRAIN_SECONDS", "soon"),
        ("METRICS_NEED_KEY", "perhaps"),
        ("LOG_FORMAT", "xml"),
        ("CORS_ORIGINS", "desk.example"),
        ("CORS_ORIGINS", "https://desk.example/path"),
        ("CORS_ORIGINS", "https://desk.example,"),
        ("CORS_ORIGINS", "https://*.example"),
        ("CORS_ORIGINS", "ftp://desk.example"),
        ("ALLOWED_HOSTS", "https://desk.example"),
        ("ALLOWED_HOSTS", "desk.example,"),
        ("ALLOWED_HOSTS", "desk.*"),
        ("ALLOWED_HOSTS", "*.*.example"),
        ("ALLOWED_HOSTS", "*.[::1]"),
        ("ALLOWED_HOSTS", "[desk.example]"),
        ("ALLOWED_HOSTS", "desk example"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel:0"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel:port"),
    ],
)
def test_a_bad_value_is_one_line_with_variable_value_and_what_it_takes(
    variable: str, value: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({variable: value})
    takes = FIELDS[variable][2].description
    assert caught.value.detail == f"{variable}='{value}' is not valid: it takes {takes}"
    assert "\n" not in caught.value.detail
    # The cause quotes the value, a secret too.
    assert caught.value.__suppress_context__


def test_of_several_bad_values_the_first_is_named() -> None:
    environ = {"QUEUE_LENGTH": "0", "DEVICE": "tpu"}
    with pytest.raises(SettingsError, match=r"^DEVICE='tpu' is not valid: it takes auto, cpu or"):
        Settings.from_environ(environ)


@pytest.mark.parametrize(
    "dsn", ["https://sentry.example/7", "https://hidden@h/project", "hidden", "ftp://hidden@h/7"]
)
def test_a_bad_sentry_dsn_is_refused_without_its_key(dsn: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"SENTRY_DSN": dsn})
    assert caught.value.detail == "SENTRY_DSN=*** is not valid: it takes https://KEY@HOST/PROJECT"


@pytest.mark.parametrize(
    "url",
    [
        *("http://h", "redis://u:hidden@h:port", "redis://u:hidden@h:0", "localhost:6379", "x"),
        *("redis://:hidden@h?timeout=5", "redis+sentinel://:hidden@h:1"),
    ],
)
def test_a_bad_redis_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"REDIS_URL=\*\*\* is not valid") as caught:
        Settings.from_environ({"REDIS_URL": url})
    assert "hidden" not in caught.value.detail


@pytest.mark.parametrize(
    ("variable", "hidden"),
    [
        ("PHI3_URL", "gpu-1:8000/v1"),
        ("PHI3_URL", "http://u:hidden@gpu-1/v1,"),
        ("PHI3_URL", "http://gpu-1/v1?key=hidden"),
        ("PHI3_URL", "http://gpu-1/v1#hidden"),
        ("PHI3_URL", "http://gpu 1/v1"),
        ("HERMES_URL", "http://u:hidden@gpu-1:0/v1"),
        ("HERMES_REMOTE_KEY", "hid den"),
        ("PHI3_REMOTE_KEY", "schlüssel"),
    ],
)
def test_a_bad_server_or_key_is_refused_without_showing_it(variable: str, hidden: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({variable: hidden})
    takes = FIELDS[variable][2].description
    assert caught.value.detail == f"{variable}=*** is not valid: it takes {takes}"


@pytest.mark.parametrize(
    "keys",
    [
        ",",
        "long-enough-key-1,",
        "long-enough-key-1,hidden",
        "hidden and with blanks",
        "é" * 20,
        "desk=hidden",
        "desk=long-enough-key-1,risk=long-enough-key-1",
        "long-enough-key-1,desk=long-enough-key-1",
    ],
)
def test_a_weak_api_key_is_refused_without_showing_one(keys: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"SIDECAR_API_KEYS": keys})
    assert caught.value.detail == (
        "SIDECAR_API_KEYS=*** is not valid: it takes keys of 16 or more visible ASCII characters, "
        "separated by commas; each may be name=key, with a name of up to 32 characters a-z, "
        "0-9, _ and -, and no key may have two names"
    )


@pytest.mark.parametrize(
    ("entry", "name", "key"),
    [
        ("desk=0123456789abcdef", "desk", "0123456789abcdef"),
        ("a_1-=0123456789abcdef", "a_1-", "0123456789abcdef"),
        (f"{'n' * 32}=0123456789abcdef", "n" * 32, "0123456789abcdef"),
        # The key itself may contain `=`.
        ("desk=MDEyMzQ1Njc4OWE=", "desk", "MDEyMzQ1Njc4OWE="),
        ("desk==0123456789abcdef", "desk", "=0123456789abcdef"),
        # What does not begin with a name is a key as a whole.
        ("0123456789abcdef", None, "0123456789abcdef"),
        ("mdeymzq1njc4owe=", None, "mdeymzq1njc4owe="),
        ("desk=0123456789", None, None),
        ("desk=0123456789a", None, "desk=0123456789a"),
        ("Desk=0123456789abcdef", None, "Desk=0123456789abcdef"),
        ("=0123456789abcdef", None, "=0123456789abcdef"),
        (f"{'n' * 33}=0123456789abcdef", None, f"{'n' * 33}=0123456789abcdef"),
    ],
)
def test_an_api_key_may_have_a_name(entry: str, name: str | None, key: str | None) -> None:
    if key is None:
        with pytest.raises(SettingsError):
            Settings.from_environ({"SIDECAR_API_KEYS": entry})
    else:
        settings = Settings.from_environ({"SIDECAR_API_KEYS": entry})
        assert settings.access.api_keys == (ApiKey(SecretStr(key), name),)


def test_a_name_may_have_two_keys_and_a_repeated_entry_counts_once() -> None:
    old, new = "desk=0123456789-the-old", "desk=0123456789-the-new"
    settings = Settings.from_environ({"SIDECAR_API_KEYS": f"{old}, {new},{old}"})
    assert settings.access.api_keys == (
        ApiKey(SecretStr("0123456789-the-old"), "desk"),
        ApiKey(SecretStr("0123456789-the-new"), "desk"),
    )


def test_api_keys_show_in_no_representation() -> None:
    keys = "hidden-from-all-1, desk=hidden-from-all-2"
    settings = Settings.from_environ({"SIDECAR_API_KEYS": keys})
    assert [key.secret.get_secret_value()[-1] for key in settings.access.api_keys] == ["1", "2"]
    assert "hidden" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a_password_shows_in_no_representation() -> None:
    settings = Settings.from_environ({"REDIS_URL": "redis://u:hidden@h:1/0"})
    assert "hidden" not in repr(settings) + str(settings)


def test_every_variable_says_what_it_takes() -> None:
    for group, name, field in FIELDS.values():
        assert field.alias, (group, name)
        assert field.description, (group, name)


def test_scripts_need_one_variable_to_be_valid_and_no_other() -> None:
    assert default_max_chars({}) == 32_768
    assert default_max_chars({"MAX_PROMPT_CHARS": ""}) == 32_768
    assert default_max_chars({"MAX_PROMPT_CHARS": "100", "QUEUE_LENGTH": "many"}) == 100
    with pytest.raises(SettingsError, match=r"^MAX_PROMPT_CHARS='0' is not valid: it takes"):
        default_max_chars({"MAX_PROMPT_CHARS": "0"})


def test_scripts_read_the_processs_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_PROMPT_CHARS", "100")
    assert default_max_chars() == 100
    monkeypatch.delenv("MAX_PROMPT_CHARS")
    assert default_max_chars() == 32_768

"""The settings, from environments that are dicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.errors import SettingsError
from llm_sidecar.settings import Settings


def test_an_empty_environment_gives_the_contracts_defaults() -> None:
    settings = Settings.from_environ({})
    assert settings.redis_url.get_secret_value() == "redis://localhost:6379/0"
    assert settings.lancedb_uri == "/app/lancedb_data"
    assert settings.adapter_dir == Path("/app/models/phi3/adapters")
    assert settings.phi3_path is settings.hermes_path is None
    assert settings.demo is settings.preload is settings.enable_metrics is False
    assert settings.device == "auto"


def test_variables_are_read_and_empty_ones_count_as_unset() -> None:
    settings = Settings.from_environ({"SIDECAR_DEMO": "true", "DEVICE": "", "PHI3_THREADS": "3"})
    assert settings.demo is True
    assert settings.device == "auto"
    assert settings.phi3_threads == 3


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DEVICE", "tpu"),
        ("SIDECAR_DEMO", "perhaps"),
        ("ENABLE_METRICS", "perhaps"),
        ("QUEUE_LENGTH", "0"),
        ("QUEUE_LENGTH", "many"),
        ("REQUEST_TIMEOUT_SECONDS", "0"),
        ("PHI3_TEMPERATURE", "nan"),
        ("HERMES_TEMPERATURE", "2.5"),
        ("FEW_SHOT_EXAMPLES", "-1"),
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
    ],
)
def test_a_bad_value_is_one_line_with_variable_value_and_what_it_takes(
    variable: str, value: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({variable: value})
    assert caught.value.detail.startswith(f"{variable}='{value}' is not valid: it takes ")
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize("url", ["http://h", "redis://u:hidden@h:port", "localhost:6379", "x"])
def test_a_bad_redis_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"REDIS_URL=\*\*\* is not valid") as caught:
        Settings.from_environ({"REDIS_URL": url})
    assert "hidden" not in caught.value.detail


@pytest.mark.parametrize(
    "keys",
    [",", "long-enough-key-1,", "long-enough-key-1,hidden", "hidden and with blanks", "é" * 20],
)
def test_a_weak_api_key_is_refused_without_showing_one(keys: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"SIDECAR_API_KEYS": keys})
    assert caught.value.detail == (
        "SIDECAR_API_KEYS=*** is not valid: it takes keys of 16 or more visible ASCII characters, "
        "separated by commas"
    )


def test_api_keys_show_in_no_representation() -> None:
    settings = Settings.from_environ({"SIDECAR_API_KEYS": "hidden-from-all-1, hidden-from-all-2"})
    assert [key.get_secret_value()[-1] for key in settings.api_keys] == ["1", "2"]
    assert "hidden" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a_password_shows_in_no_representation() -> None:
    settings = Settings.from_environ({"REDIS_URL": "redis://u:hidden@h:1/0"})
    assert "hidden" not in repr(settings) + str(settings)


def test_every_variable_says_what_it_takes() -> None:
    for name, field in Settings.model_fields.items():
        assert field.alias, name
        assert field.description, name

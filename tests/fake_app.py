"""The app, with workers whose engine repeats the prompt: see `tests.fake_worker`."""

from __future__ import annotations

from llm_sidecar.models.local import process
from llm_sidecar.settings import Settings
from osiris import logs
from osiris.server import create_app

process._PROGRAM = "tests.fake_worker"  # type: ignore[misc]

_settings = Settings.from_environ()
logs.configure(_settings.telemetry.log_format)
app = create_app(_settings)

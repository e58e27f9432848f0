"""The state of the sidecar, as `/health`, the probes and `/metrics` show it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any, Literal

from llm_sidecar import __version__
from llm_sidecar.db import Store
from llm_sidecar.event_bus import EventBus
from llm_sidecar.models import files
from llm_sidecar.models.base import Models, ModelStatus
from llm_sidecar.services.adapters import Adapters
from llm_sidecar.services.event_feed import EventFeed
from llm_sidecar.services.forecast import Forecast
from llm_sidecar.services.rows import Rows
from llm_sidecar.settings import Settings
from llm_sidecar.tts.listeners import AudioListeners
from llm_sidecar.tts.remote import RemoteVoice
from llm_sidecar.tts.speaker import Speaker

log = logging.getLogger(__name__)


class Health:
    """Reports the state of each component, without I/O."""

    def __init__(
        self,
        settings: Settings,
        *,
        models: Models,
        adapters: Adapters,
        bus: EventBus,
        store: Store,
        rows: Rows,
        speaker: Speaker,
        remote_voice: RemoteVoice | None,
        listeners: AudioListeners,
        event_feed: EventFeed,
    ) -> None:
        """Starts to count the uptime."""
        self._began = time.monotonic()
        self._settings = settings
        self._models = models
        self._adapters = adapters
        self._bus = bus
        self._store = store
        self._rows = rows
        self._speaker = speaker
        self._remote_voice = remote_voice
        self._listeners = listeners
        self._event_feed = event_feed

    def missing(self) -> dict[str, str]:
        """Why the next proposal or feedback would fail, by component; empty if both would succeed.

        Outages of Redis or LanceDB do not count, because events and rows wait for them.
        """
        reasons = {
            "phi3": self._models.phi3.status().not_ready,
            "hermes": self._models.hermes.status().not_ready,
            "database": self._store.refusal(),
        }
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def status(self) -> Literal["ok", "partial_error", "error"]:
        """The overall state: `error` if no model is available."""
        missing = self.missing()
        if {"phi3", "hermes"} <= set(missing):
            return "error"
        whole = self._bus.connected and self._speaker.available() and self._store.is_open()
        whole = whole and self._adapters.problem is None
        models = [model.status() for model in self._models]
        failed = any(one.state == "failed" for status in models for one in status.replicas)
        return "ok" if whole and not missing and not failed else "partial_error"

    def log_forecast(self) -> None:
        """Logs what a proposal will take, if both models are loaded, and warns if its deadline is
        too short."""
        forecast = self._forecast()
        if forecast.total is None:
            return
        log.info(
            "forecast: a proposal %.1f s, its critique %.1f s, its score %.1f s",
            forecast.proposal,
            forecast.critique,
            forecast.score,
        )
        if warning := forecast.warning(self._settings.limits.request_timeout):
            log.warning("%s", warning)

    def report(self) -> dict[str, Any]:
        """The overall state and the state of each component: JSON types only."""
        phi3, hermes = self._models.phi3.status(), self._models.hermes.status()
        date = self._adapters.date()
        return {
            "status": self.status(),
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "hermes_loaded": hermes.state == "ready",
            "phi3_loaded": phi3.state == "ready",
            "phi3_model_file_exists": files.phi3_model_file_exists(self._settings),
            "device": phi3.device or self._settings.models.device,
            "phi3_adapter_date": None if date is None else date.isoformat(),
            "phi3_adapter_problem": self._adapters.problem,
            "mean_hermes_score_last_24h": self._rows.mean_score,
            "num_hermes_scores_last_24h": self._rows.num_scores,
            "models": {"phi3": _model(phi3), "hermes": _model(hermes)},
            "forecast": self._shown_forecast(),
            "event_bus": self._bus.status() | {"listeners": self._event_feed.count},
            "database": self._store.status(),
            "speech": {
                **self._speaker.status(),
                "workers": [] if self._remote_voice is None else self._remote_voice.workers(),
                "queued": 0 if self._remote_voice is None else self._remote_voice.queued,
                "listeners": self._listeners.count,
                "lost": self._listeners.lost,
            },
        }

    def _forecast(self) -> Forecast:
        return Forecast.of(self._models, self._settings.models.critique_max_tokens)

    def _shown_forecast(self) -> dict[str, Any]:
        forecast, timeout = self._forecast(), self._settings.limits.request_timeout
        return {
            "proposal_seconds": _rounded(forecast.proposal),
            "critique_seconds": _rounded(forecast.critique),
            "score_seconds": _rounded(forecast.score),
            "timeout_seconds": timeout,
            "warning": forecast.warning(timeout),
        }


def _model(status: ModelStatus) -> dict[str, Any]:
    """A model's state as JSON types, without `not_ready`."""
    shown = asdict(status)
    del shown["not_ready"]
    shown["adapter"] = None if status.adapter is None else status.adapter.name
    shown["notes"] = list(status.notes)
    shown["servers"] = list(shown["servers"])
    shown["replicas"] = list(shown["replicas"])
    if status.speed is not None:
        shown["speed"] = {name: round(value, 2) for name, value in shown["speed"].items()}
    return shown


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)

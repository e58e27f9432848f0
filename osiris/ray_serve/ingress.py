"""The deployment of the sidecar: the API, whose models are other deployments."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from llm_sidecar.models.base import Models
from llm_sidecar.models.ray.model import RayModel
from llm_sidecar.models.registry import limits_of
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import CallObserver, WorkerDeath
from osiris import logs
from osiris.ray_serve.handles import RayReplicas
from osiris.ray_serve.ports import listen_on_this_node_only
from osiris.ray_serve.request_id import WithoutRequestId
from osiris.server import create_app


def sidecar() -> FastAPI:
    """The app; Ray Serve calls this in each replica of the sidecar."""
    listen_on_this_node_only()
    settings = Settings.from_environ()
    logs.configure(settings.telemetry.log_format)
    app = create_app(settings, _models)
    app.add_middleware(WithoutRequestId)
    return app


def _models(
    settings: Settings,
    observer: CallObserver,
    on_death: Callable[[WorkerDeath], None],
    on_ready: Callable[[], None],
) -> Models:
    # The replicas log the ends of their workers.
    limits = limits_of(settings)
    return Models(
        *(
            RayModel(name, RayReplicas(name), limits=limits, observer=observer)
            for name in Models._fields
        )
    )

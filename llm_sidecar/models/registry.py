"""Builds the models from the settings: the `ChatModel` for phi3, and the one for hermes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import SecretStr

from llm_sidecar.engines.base import EngineOptions
from llm_sidecar.models import files
from llm_sidecar.models.base import ChatModel, Models
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.options import hermes_options, phi3_options
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import CallObserver, WorkerDeath

MakeModels = Callable[
    [Settings, CallObserver, Callable[[WorkerDeath], None], Callable[[], None]], Models
]
"""The type of `create_models`."""


def limits_of(settings: Settings) -> ModelLimits:
    """The bounds of each model."""
    return ModelLimits(
        queue_length=settings.limits.queue_length,
        request_timeout=settings.limits.request_timeout,
        load_wait=settings.models.load_wait,
        load_timeout=settings.models.load_timeout,
    )


def create_models(
    settings: Settings,
    observer: CallObserver,
    on_death: Callable[[WorkerDeath], None],
    on_ready: Callable[[], None] = lambda: None,
) -> Models:
    """Builds the models that the settings specify; starts nothing.

    Args:
        settings: of the sidecar.
        observer: receives the start and the end of each model call.
        on_death: is called when a worker process ends unexpectedly.
        on_ready: is called when a model has been loaded.
    """
    limits = limits_of(settings)

    def local(
        name: str,
        locate: Callable[[Settings], files.ModelFiles],
        options: EngineOptions,
        replicas: int,
    ) -> LocalModel:
        return LocalModel(
            name,
            lambda: locate(settings),
            options=options,
            limits=limits,
            replicas=replicas,
            preload=settings.models.preload,
            log_format=settings.telemetry.log_format,
            observer=observer,
            on_death=on_death,
            on_ready=on_ready,
        )

    def remote(
        name: str, urls: Sequence[SecretStr], model: str | None, key: SecretStr | None
    ) -> RemoteModel:
        return RemoteModel(
            name, urls, model=model, key=key, limits=limits, observer=observer, on_ready=on_ready
        )

    where = settings.models
    phi3: ChatModel
    if where.phi3_urls:
        phi3 = remote("phi3", where.phi3_urls, where.phi3_remote_model, where.phi3_remote_key)
    else:
        phi3 = local("phi3", files.locate_phi3, phi3_options(settings), where.phi3_replicas)
    hermes: ChatModel
    if where.hermes_urls:
        hermes = remote(
            "hermes", where.hermes_urls, where.hermes_remote_model, where.hermes_remote_key
        )
    else:
        hermes = local(
            "hermes", files.locate_hermes, hermes_options(settings), where.hermes_replicas
        )
    return Models(phi3, hermes)

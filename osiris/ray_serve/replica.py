"""The deployment of one model: each replica has a worker process of its own."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from ray import serve

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db.location import location_of
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.event_bus.facts import Facts
from llm_sidecar.event_bus.redis_url import close_client, make_client
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter, ChatModel, GenerationRequest
from llm_sidecar.models.ray.replica import CurrentCall, ModelReplica
from llm_sidecar.models.registry import create_models
from llm_sidecar.services.shared_adapter import SharedAdapter, adapter_at_start, adapter_named
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import CallObserver
from osiris import logs
from osiris.ray_serve.handles import APP
from osiris.ray_serve.ports import listen_on_this_node_only

_POLL: Final = 0.05
"""Seconds."""


def make_model(name: str, settings: Settings, observer: CallObserver) -> ChatModel:
    """The model that the settings specify."""
    model: ChatModel = getattr(create_models(settings, observer, lambda death: None), name)
    return model


class ModelDeployment:
    """One replica. Ray sends it requests once its model is loaded, with the adapter in use.

    If the model cannot be loaded, for instance because its files are missing, the first replica
    starts all the same, and every answer says why, as that of a sidecar on its own does.
    """

    # Ray awaits it, on the event loop of the requests.
    async def __init__(  # type: ignore[misc]
        self, name: str, threads: int, factory: str
    ) -> None:
        """Loads the model.

        Args:
            name: `phi3` or `hermes`.
            threads: CPU threads of its worker, unless the settings say otherwise.
            factory: see `Options.model`.

        Raises:
            ModelUnavailable: it cannot be loaded, and another replica serves, which an update must
                not replace by this one; Ray tries again.
            AdapterRejected: this machine does not have the adapter in use.
        """
        listen_on_this_node_only()
        settings = _settings(threads)
        logs.configure(settings.telemetry.log_format)
        module, _, function = factory.partition(":")
        make = getattr(importlib.import_module(module), function)
        self._model: ChatModel = make(name, settings, CurrentCall())
        folder = settings.models.adapter_dir
        replica = serve.get_replica_context().replica_id.unique_id
        self._replica = ModelReplica(
            replica, self._model, lambda adapter: adapter_named(folder, adapter)
        )
        # The speed is measured with it.
        await self._model.prefill(_prefix(name, settings))
        await self._model.start(await _adapter(settings) if name == "phi3" else None)
        self._was_loaded = await _loaded(self._model)
        if not self._was_loaded and await asyncio.to_thread(_others_serve, name):
            await self._model.close()
            raise ModelUnavailable(f"{name} cannot be loaded: {self._model.status().reason}")

    async def answer(self, call: bytes) -> AsyncGenerator[bytes, None]:
        """See `ModelReplica.answer`."""
        async for answer in self._replica.answer(call):
            yield answer

    async def obey(self, order: bytes) -> bytes:
        """See `ModelReplica.obey`."""
        return await self._replica.obey(order)

    async def check_health(self) -> None:
        """Raises if the model has failed after it was loaded; Ray then replaces this replica."""
        status = self._model.status()
        self._was_loaded |= status.state == "ready"
        if self._was_loaded and status.state == "failed":
            raise ModelUnavailable(status.reason or "The model has failed.")

    async def __del__(self) -> None:
        """Ends the worker; Ray has waited for the running requests."""
        await self._model.close()


def _settings(threads: int) -> Settings:
    default = {name: str(threads) for name in ("PHI3_THREADS", "HERMES_THREADS")}
    return Settings.from_environ({**default, **os.environ, "PRELOAD_MODELS": "true"})


def _prefix(name: str, settings: Settings) -> GenerationRequest:
    """What every prompt begins with; the sidecar sends the examples later."""
    if name == "phi3":
        return proposals.prefix((), settings.models.phi3_temperature)
    return hermes_plugin.prefix(hermes_plugin.prompts_for(settings).system)


async def _adapter(settings: Settings) -> Adapter | None:
    """The adapter that the sidecars use now."""
    folder: Path = settings.models.adapter_dir
    location = location_of(settings.database.uri, settings.database.log_dir)
    client = make_client(settings.events.url.get_secret_value())
    try:
        shared = SharedAdapter(Facts(client, settings.events.stream))
        return await adapter_at_start(shared, AdapterState(location.log_folder, folder), folder)
    finally:
        await close_client(client)


async def _loaded(model: ChatModel) -> bool:
    """Waits until the model is loaded, or cannot be."""
    while True:
        state = model.status().state
        if state in ("ready", "failed"):
            return state == "ready"
        await asyncio.sleep(_POLL)


def _others_serve(name: str) -> bool:
    """Whether replicas of this model are running."""
    found = serve.status().applications[APP].deployments.get(name)
    return found is not None and found.replica_states.get("RUNNING", 0) > 0

"""The names under which clients ask for a model: `phi3`, `hermes`, and each adapter of phi3."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llm_sidecar.errors import AdapterRejected, NotFound
from llm_sidecar.models import adapters
from llm_sidecar.models.base import ChatModel, Models

log = logging.getLogger(__name__)

PHI3: Final = "phi3"
HERMES: Final = "hermes"
_NOT_IN_USE: Final = (
    "model: this adapter is not in use or does not exist; GET /v1/models lists the adapters, POST "
    "/adapters/swap switches to one, and phi3 alone names the one in use"
)
_UNKNOWN: Final = "model: there is no such model; GET /v1/models lists them"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by its name.

    Attributes:
        name: `phi3`, `hermes`, or `phi3:` and the name of an adapter.
        created: when its folder was made, in seconds since 1970; 0 if that is not known.
        parent: `phi3` for an adapter, else None.
    """

    name: str
    created: int = 0
    parent: str | None = None


class ServedModels:
    """Finds models by their names."""

    def __init__(self, models: Models, adapter_dir: Path) -> None:
        """Does no I/O yet.

        Args:
            models: phi3 and hermes.
            adapter_dir: the folder of phi3's dated adapters.
        """
        self._models = models
        self._adapter_dir = adapter_dir

    def find(self, name: str) -> ChatModel:
        """The model that answers under a name.

        Raises:
            NotFound: there is none, or it is an adapter that is not in use.
        """
        base, _, adapter = name.partition(":")
        if name == HERMES:
            return self._models.hermes
        if base != PHI3 or (":" in name and not adapter):
            raise NotFound(_UNKNOWN)
        if adapter:
            in_use = self._models.phi3.status().adapter
            self.check_adapter(name, None if in_use is None else in_use.name)
        return self._models.phi3

    def check_adapter(self, name: str, adapter: str | None) -> None:
        """Checks that a model still uses the adapter in its name, which a swap may have replaced.

        Raises:
            NotFound: it does not.
        """
        _, _, wanted = name.partition(":")
        if wanted and wanted != adapter:
            raise NotFound(_NOT_IN_USE)

    async def list(self) -> list[ServedModel]:
        """All models, and the adapters in the folder of adapters, newest first."""
        # In a thread, because the folder may be on a slow disk.
        found = await asyncio.to_thread(self._adapters)
        return [ServedModel(PHI3), ServedModel(HERMES), *found]

    async def get(self, name: str) -> ServedModel:
        """The model or adapter with this name, whether in use or not.

        Raises:
            NotFound: there is none.
        """
        for model in await self.list():
            if model.name == name:
                return model
        raise NotFound(_UNKNOWN)

    def _adapters(self) -> Sequence[ServedModel]:
        try:
            folders = adapters.list_adapter_dirs(self._adapter_dir)
        except AdapterRejected as error:
            # An unreadable folder must not hide the models.
            log.warning("the list of models has no adapters: %s", error.detail)
            return []
        return [
            ServedModel(f"{PHI3}:{folder.name}", _modified(folder), PHI3)
            for folder in reversed(folders)
        ]


def _modified(folder: Path) -> int:
    try:
        return int(folder.stat().st_mtime)
    except OSError:
        return 0

"""Saves the name of the adapter in use to a small file, so that the next start uses it again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from llm_sidecar.models import adapters
from llm_sidecar.models.base import Adapter

log = logging.getLogger(__name__)

_NAME: Final = "phi3_adapter"
_LONGEST: Final = 64


class AdapterState:
    """The name of Phi-3's adapter, in a file."""

    def __init__(self, folder: Path, adapter_dir: Path) -> None:
        """Reads nothing yet.

        Args:
            folder: the folder of the file.
            adapter_dir: the folder of dated adapters.
        """
        self._file = folder / _NAME
        self._adapter_dir = adapter_dir

    def load(self) -> Adapter | None:
        """The saved adapter; None if none was in use or its folder no longer exists."""
        try:
            name = self._file.read_text(errors="replace")[:_LONGEST].strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.error("the saved adapter name cannot be read: %s", error.strerror)
            return None
        if not name:
            return None
        # Only a name counts, not a path: a changed file must not lead to another folder.
        folder = self._adapter_dir / name
        known = folder.name == name and adapters.adapter_date(folder) is not None
        if known and adapters.holds_adapter(folder):
            return Adapter(folder)
        log.error(
            "the adapter that was in use, %r, is not in PHI3_ADAPTER_DIR; phi3 answers without one",
            name,
        )
        return None

    def save(self, adapter: Adapter | None) -> None:
        """Saves the adapter's name, or its absence; a failure is logged."""
        part = self._file.with_suffix(".part")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w") as file:
                file.write("" if adapter is None else adapter.name)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._file)
        except OSError as error:
            log.error(
                "the name of the adapter in use is not saved: %s: %s",
                part,
                error.strerror,
            )

"""The locations of a database, its journal and its locks."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llm_sidecar.journal.file import NAME
from llm_sidecar.settings import Database

TABLE_SUFFIX: Final = ".lance"
_LOG: Final = "_log"
_SHARED: Final = (NAME, f"{NAME}-wal", f"{NAME}-shm")
"""Files in the log folder that every process opens for writing, beside the locks."""


@dataclass(frozen=True, slots=True)
class Location:
    """The location of one database.

    Attributes:
        uri: for lancedb: an absolute folder, or an `s3://` address.
        shown: for people: the address as it was given, without credentials and query.
        folder: the local folder; None for an object store.
        log_folder: the local folder of the journal and of locks, for all processes of this machine
            that use the database.
        storage_options: lancedb's options for an object store.
    """

    uri: str
    shown: str
    folder: Path | None
    log_folder: Path
    storage_options: dict[str, str]

    @property
    def set_aside(self) -> Path:
        """The folder for unreadable files."""
        return self.log_folder / "set_aside"

    def may_write(self) -> bool:
        """Whether this user has permission to write tables, locks and journal."""
        needed = [_nearest(self.log_folder)]
        try:
            if self.log_folder.exists():
                needed += [path for path in self.log_folder.iterdir() if _is_shared(path.name)]
            if self.folder is not None and self.folder.exists():
                needed += [self.folder, *self.folder.glob(f"*{TABLE_SUFFIX}")]
        except OSError:
            return False
        return all(os.access(path, os.W_OK, effective_ids=True) for path in needed)


def _is_shared(name: str) -> bool:
    return name in _SHARED or name.endswith(".lock")


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    # Not Path.exists, which raises if there is no permission to search a parent.
    while not os.path.exists(folder) and folder != folder.parent:  # noqa: PTH110
        folder = folder.parent
    return folder


def location_of(uri: str | Path, log_dir: Path | None = None) -> Location:
    """The location of the database at a folder or an address.

    The journal of a local database is inside its folder. That of an object store is below
    `log_dir`, which should outlive the container.

    Args:
        uri: a folder, or an `s3://` address.
        log_dir: `LANCEDB_LOG_DIR` unless given.
    """
    text = str(uri)
    if "://" not in text:
        # Absolute, because lancedb takes a relative path that begins with "db" for its cloud.
        folder = Path(text).absolute()
        return Location(str(folder), text, folder, folder / _LOG, {})
    configured = Database.from_environ()
    logs = log_dir or configured.log_dir
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    endpoint = configured.s3_endpoint or configured.aws_endpoint
    options = {"endpoint": endpoint} if endpoint else {}
    if endpoint and endpoint.startswith("http://"):
        options["allow_http"] = "true"
    scheme, _, rest = text.partition("://")
    shown = f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
    return Location(text, shown, None, logs.absolute() / name, options)


def default_uri() -> str:
    """`LANCEDB_URI`, or the folder in the container."""
    return Database.from_environ().uri

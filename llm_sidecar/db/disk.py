"""What LanceDB leaves out: it never syncs a file, so a power loss can take what it acknowledged.

`Disk.sync` makes the tables' files survive one and notes up to which version of each table that is
so. What lies beyond is in some write-ahead log, so that an unreadable newest version can be set
aside without losing a row. The names of Lance's files are those of its table format
(https://lance.org/format/table/): `_versions/N.manifest`, N counted down from 2**64 - 1.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Final

from llm_sidecar.db.location import Location
from llm_sidecar.db.log import locked, sync_folder
from llm_sidecar.db.rows import TABLES

_NOTE: Final = "synced.json"
_HINT: Final = "latest_version_hint.json"
_MANIFEST: Final = ".manifest"
_MAGIC: Final = b"LANC"
_HIGHEST: Final = 2**64 - 1


class Disk:
    """The tables' files of a database in a local folder. Every method blocks, for a disk's time."""

    def __init__(self, location: Location) -> None:
        """Touches nothing."""
        assert location.folder is not None
        self._folder = location.folder
        self._logs = location.log_folder
        self._aside = location.set_aside
        self._synced: dict[str, frozenset[Path]] = {}

    def adopt(self, newest: dict[str, int]) -> None:
        """Notes the tables of a database that no note is kept of yet, and counts them as synced.

        Args:
            newest: the newest version of each table that is there.
        """
        if not (self._logs / _NOTE).exists():
            self._write_note(newest)

    def synced_versions(self) -> dict[str, int] | None:
        """Up to which version each table is known to be synced; None where nobody has noted it."""
        try:
            text = (self._logs / _NOTE).read_text()
        except FileNotFoundError:
            return None
        try:
            return {str(table): int(version) for table, version in json.loads(text).items()}
        except (ValueError, AttributeError):
            return {}

    def sync(self, versions: dict[str, int]) -> None:
        """Syncs every file that is not known to be synced, then notes the versions.

        Args:
            versions: of each table, at most what was there before the call.
        """
        for table in versions:
            self._sync_table(table)
        sync_folder(self._folder)
        with locked(self._logs / f"{_NOTE}.lock"):
            noted = self.synced_versions() or {}
            merged = {t: max(v, noted.get(t, 0)) for t, v in versions.items()}
            if any(noted.get(table) != version for table, version in merged.items()):
                self._write_note(noted | merged)

    def _sync_table(self, table: str) -> None:
        known = self._synced.get(table, frozenset())
        found: set[Path] = set()
        for folder, folders, names in os.walk(self._table(table)):
            files = {Path(folder, name) for name in names if name != _HINT}
            entries = files | {Path(folder, name) for name in folders}
            found |= entries
            # Another process may have tidied any of them away.
            for path in files - known:
                with contextlib.suppress(FileNotFoundError):
                    _sync_file(path)
            if entries - known or not known:
                with contextlib.suppress(FileNotFoundError):
                    sync_folder(Path(folder))
        self._synced[table] = frozenset(found)

    def _write_note(self, versions: dict[str, int]) -> None:
        temporary = self._logs / f"{_NOTE}.tmp"
        temporary.write_text(json.dumps(versions))
        _sync_file(temporary)
        temporary.replace(self._logs / _NOTE)
        sync_folder(self._logs)

    def tables(self) -> list[str]:
        """The tables that are there, readable or not."""
        return [table for table in TABLES if self._table(table).is_dir()]

    def newest_version(self, table: str) -> int:
        """The version that the newest manifest's name says; 0 where there is none."""
        return max((version for version, _ in self._manifests(table)), default=0)

    def set_newest_aside(self, table: str) -> str:
        """Moves the newest version of a table away; the whole table where it has no version left.

        Returns:
            What was done, in words.

        Raises:
            OSError: the files cannot be read or moved, which is no reason to set them aside.
        """
        manifests = self._manifests(table)
        if not manifests:
            self._aside.mkdir(parents=True, exist_ok=True)
            stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
            shutil.move(self._table(table), self._aside / f"{stamp}-{table}.lance")
            return f"{table}: no version can be read, so the table is set aside"
        return self._set_aside(table, *max(manifests))

    def set_torn_aside(self, table: str) -> list[str]:
        """Moves every version away whose manifest does not end as one does.

        Returns:
            What was done, in words, a line a version.

        Raises:
            OSError: the files cannot be read or moved.
        """
        return [
            self._set_aside(table, version, manifest)
            for version, manifest in self._manifests(table)
            if not manifest.read_bytes().endswith(_MAGIC)
        ]

    def _set_aside(self, table: str, version: int, manifest: Path) -> str:
        manifest.read_bytes()
        self._aside.mkdir(parents=True, exist_ok=True)
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
        shutil.move(manifest, self._aside / f"{stamp}-{table}-{version}{_MANIFEST}")
        manifest.with_name(_HINT).unlink(missing_ok=True)
        self._synced.pop(table, None)
        sync_folder(manifest.parent)
        return f"{table}: version {version} cannot be read, so it is set aside"

    def _manifests(self, table: str) -> list[tuple[int, Path]]:
        """(version, file) of every manifest, in either of Lance's naming schemes."""
        found = []
        for path in (self._table(table) / "_versions").glob(f"*{_MANIFEST}"):
            with contextlib.suppress(ValueError):
                number = int(path.stem)
                found.append((number if number < _HIGHEST // 2 else _HIGHEST - number, path))
        return found

    def _table(self, table: str) -> Path:
        return self._folder / f"{table}.lance"


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

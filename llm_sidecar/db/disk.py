"""Syncs the tables' files, because LanceDB does not: without it a power loss may destroy rows.

`Disk.sync` syncs the files and records the synced version of each table. The rows of newer versions
are still in the journal, so an unreadable newest version can be set aside without losing
rows. The file names are those of Lance's table format (https://lance.org/format/table/):
`_versions/N.manifest`, where N counts down from 2**64 - 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Final

from llm_sidecar.db.location import Location
from llm_sidecar.db.rows import TABLES
from llm_sidecar.journal.locks import dated, locked, sync_folder

_NOTE: Final = "synced.json"
_HINT: Final = "latest_version_hint.json"
_MANIFEST: Final = ".manifest"
_MAGIC: Final = b"LANC"
_HIGHEST: Final = 2**64 - 1


class Disk:
    """The files of the tables of a local database. Every method blocks on the disk."""

    def __init__(self, location: Location) -> None:
        """Does no I/O yet."""
        assert location.folder is not None
        self._folder = location.folder
        self._logs = location.log_folder
        self._aside = location.set_aside
        self._synced: dict[str, frozenset[Path]] = {}

    def adopt(self, newest: dict[str, int]) -> None:
        """Records the tables as synced, if the database has no record yet.

        Args:
            newest: the newest version of each existing table.
        """
        if not (self._logs / _NOTE).exists():
            self._write_note(newest)

    def synced_versions(self) -> dict[str, int] | None:
        """The last version of each table that is known to be synced; None without a record."""
        try:
            text = (self._logs / _NOTE).read_text()
        except FileNotFoundError:
            return None
        try:
            return {str(table): int(version) for table, version in json.loads(text).items()}
        except (ValueError, AttributeError):
            return {}

    def sync(self, versions: dict[str, int]) -> None:
        """Syncs every file that is not known to be synced, then records the versions.

        Args:
            versions: a version of each table, which must exist before the call.
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
            # Another process may have deleted any of them.
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
        """The existing tables, readable or not."""
        return [table for table in TABLES if self._table(table).is_dir()]

    def newest_version(self, table: str) -> int:
        """The version in the name of the newest manifest; 0 without a manifest."""
        return max((version for version, _ in self._manifests(table)), default=0)

    def set_newest_aside(self, table: str) -> str:
        """Moves the newest version of a table to the set-aside folder, or the whole table if it has
        no version.

        Returns:
            What was done, in words.

        Raises:
            OSError: the files cannot be read or moved. They may be intact, so they stay.
        """
        manifests = self._manifests(table)
        if not manifests:
            shutil.move(self._table(table), dated(self._aside, f"{table}.lance"))
            return f"{table}: no version can be read, so the table is set aside"
        return self._set_aside(table, *max(manifests))

    def set_torn_aside(self, table: str) -> list[str]:
        """Moves every version whose manifest is truncated to the set-aside folder.

        Returns:
            What was done, in words, one line per version.

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
        shutil.move(manifest, dated(self._aside, f"{table}-{version}{_MANIFEST}"))
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

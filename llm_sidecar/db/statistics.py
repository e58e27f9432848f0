"""The size of each table, in rows, fragments, versions, files and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_sidecar.db.location import Location
from llm_sidecar.db.rows import TABLES
from llm_sidecar.db.tables import Tables


async def statistics(location: Location, tables: Tables) -> list[dict[str, Any]]:
    """One entry per table, and a last one for the journal.

    Returns:
        For each table `rows`, `fragments` and `versions`; `files` and `bytes` on disk, or for an
        object store None and the bytes of the current version; `last_compaction`, an aware time or
        None. The entry of the journal has the files and bytes of its folder; the rest is None.
    """
    found: list[dict[str, Any]] = []
    for name in TABLES:
        table = tables[name]
        stats = await table.stats()
        files, size = None, int(stats["total_bytes"])
        if location.folder is not None:
            files, size = _on_disk(location.folder / f"{name}.lance")
        found.append(
            {
                "table": name,
                "rows": int(stats["num_rows"]),
                "fragments": int(stats["fragment_stats"]["num_fragments"]),
                "versions": len(await table.list_versions()),
                "files": files,
                "bytes": size,
                "last_compaction": tables.last_compaction(),
            }
        )
    files, size = _on_disk(location.log_folder)
    journal = {"table": "(journal)", "files": files, "bytes": size}
    return [*found, {name: journal.get(name) for name in found[0]}]


def _on_disk(folder: Path) -> tuple[int, int]:
    sizes = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except OSError:
            # The file has just been deleted, or there is no permission.
            continue
    return len(sizes), sum(sizes)

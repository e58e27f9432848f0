"""How large the tables are, and in how many pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_sidecar.db.location import Location
from llm_sidecar.db.rows import TABLES
from llm_sidecar.db.tables import Tables


async def statistics(location: Location, tables: Tables) -> list[dict[str, Any]]:
    """One entry a table, and one of the write-ahead logs.

    Returns:
        `rows`, `fragments`, `versions`; `files` and `bytes` on disk, or None and the live bytes for
        an object store; `last_compaction`, an aware time or None. The logs' entry counts the files
        and bytes of every process's log, and among its rows nothing.
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
    log = {"table": "(log)", "files": files, "bytes": size}
    return [*found, {name: log.get(name) for name in found[0]}]


def _on_disk(folder: Path) -> tuple[int, int]:
    sizes = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except OSError:
            # It has just been deleted, or there is no permission.
            continue
    return len(sizes), sum(sizes)

"""A server without free file descriptors: it loses nothing, and recovers by itself."""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_sidecar.db import FEEDBACK, Store
from tests.live_server import LiveServer, serve

LIMIT = 64


async def stored(folder: Path) -> list[str]:
    store = await Store.open(folder, create=False)
    try:
        return sorted(row["transaction_id"] for row in await store.last(FEEDBACK, 0))
    finally:
        await store.close()


def submit(server: LiveServer, number: int) -> str:
    name = f"{number:03}"
    feedback = {"transaction_id": name, "feedback_type": "rating", "feedback_content": "5"}
    assert server.client.post("/feedback/phi3/", json=feedback).status_code == 200
    return name


def test_rows_are_kept_while_connections_take_every_descriptor(tmp_path: Path) -> None:
    with serve(tmp_path, app="tests.quick_app:app") as server, ExitStack() as stack:
        server.wait_until_ready()
        server.wait_until_database_is_open()
        acknowledged = [submit(server, 0)]
        address = urlsplit(server.url)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
        for _ in range(2 * LIMIT):
            stack.enter_context(socket.create_connection((address.hostname, address.port)))

        def database() -> dict[str, Any]:
            health: dict[str, dict[str, Any]] = server.client.get("/health").json()
            return health["database"]

        acknowledged.append(submit(server, 1))
        server.wait_until(lambda: "Too many open files" in (database()["reason"] or ""))
        acknowledged += [submit(server, number) for number in range(2, 50)]
        stack.close()
        server.wait_until(lambda: database()["state"] == "open")
        server.wait_until(lambda: database()["rows_waiting"] == 0)
        acknowledged.append(submit(server, 50))
        server.stop()
    assert asyncio.run(stored(tmp_path / "lancedb")) == acknowledged

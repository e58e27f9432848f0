"""The start time of a server with the demo models and of the command line, and the server's
memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import models
from benchmarks.table import Row
from llm_sidecar import db
from tests.live_server import serve

_ROUNDS = 5


def command_line(rounds: int) -> Iterator[Row]:
    """The duration of a command, compared with importing lancedb in the same environment."""
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        db.init_db(folder)
        commands = {
            "query-runs": ("-m", "llm_sidecar.db", "query-runs"),
            "import": ("-c", "import lancedb"),
            "help": ("-m", "llm_sidecar.db", "--help"),
        }
        took: dict[str, list[float]] = {name: [] for name in commands}
        # In turn, as the speed of a shared machine drifts; the first round fills the page cache.
        for _ in range(_ROUNDS + 1):
            for name, arguments in commands.items():
                began = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments],
                    env=os.environ | {"LANCEDB_URI": folder},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
                took[name].append(time.perf_counter() - began)
    median = {name: statistics.median(seconds[1:]) for name, seconds in took.items()}
    imported = f"`import lancedb` takes {median['import']:.2f} s"
    yield Row(
        "`query-runs`, of the time of `import lancedb`",
        median["query-runs"] / median["import"],
        1.5,
        imported,
    )
    yield Row("`--help` of the database command line", median["help"], None, imported, unit=" s")


def memory_and_start(rounds: int) -> Iterator[Row]:
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        everything = {
            "SIDECAR_DEMO": "true",
            "PRELOAD_MODELS": "true",
            "ENABLE_METRICS": "true",
            "SIDECAR_API_KEYS": "a-key-for-the-benchmark",
        }
        with serve(Path(folder), **everything) as server:
            server.client.headers["X-API-Key"] = everything["SIDECAR_API_KEYS"]
            body = {"prompt": models.prompts(1)[0]}
            server.wait_until(
                lambda: server.client.post("/generate/phi3/", json=body).status_code == 200
            )
            first = time.perf_counter() - began
            server.wait_until_ready()
            server.wait_until_database_is_open()
            for path, sent in (
                ("/propose_trade_adjustments/", body),
                ("/generate/hermes/", body),
                ("/speak", {"text": "Stop moved."}),
                (
                    "/feedback/phi3/",
                    {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"},
                ),
            ):
                server.client.post(path, json=sent).raise_for_status()
            server.client.get("/metrics").raise_for_status()
            status = Path(f"/proc/{server.process.pid}/status").read_text()
    memory = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    yield Row(
        "memory of the API process, every component in use",
        int(memory) / 1024,
        220,
        "demo models",
        unit=" MB",
        missed="95 MB are its own; the rest is code of libraries in the page cache, of which "
        "lancedb has 60 MB; how much of it is mapped varies by 14 MB between two copies on one "
        "machine",
    )
    yield Row(
        "from the start of the server to the first proposal", first, 6, "demo models", unit=" s"
    )

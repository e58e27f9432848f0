"""Adapters of a running server: switched, refused, saved for the next start."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import loader
from llm_sidecar.engines.lora_graph import ADAPTER_FILE
from llm_sidecar.errors import AdapterRejected
from llm_sidecar.models.lora import convert_adapter
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from tests.live_server import LiveServer, is_running, serve
from tests.random_models import write_adapter

PROMPT = {"prompt": "Long ABC from 100, now 112.5.", "max_length": 256}


@pytest.fixture(scope="module")
def adapters(
    random_phi3_torch: Path, random_phi3_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two good ones, and a newer one that is half written."""
    folder, peft = tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("peft")
    for day in (1, 2):
        source = write_adapter(random_phi3_torch, peft / str(day), seed=day)
        convert_adapter(source, random_phi3_onnx, folder / f"2026010{day}")
    shutil.copytree(folder / "20260102", folder / "20260103")
    (folder / "20260103" / ADAPTER_FILE).unlink()
    return folder


@contextlib.contextmanager
def running(folder: Path, adapters: Path, models: dict[str, str]) -> Iterator[LiveServer]:
    environ = models | {"PHI3_ADAPTER_DIR": str(adapters), "PRELOAD_MODELS": "true"}
    with serve(folder, **environ) as server:
        server.wait_until_ready()
        yield server


def swap(server: LiveServer, name: str | None = None) -> tuple[int, str]:
    body = None if name is None else {"adapter": name}
    answer = server.client.post("/adapters/swap", json=body)
    said = answer.json()
    return answer.status_code, str(said.get("detail", said.get("phi3_adapter_date")))


def ask_and_go(server: LiveServer, path: str, body: Any) -> None:
    """Sends a request and hangs up at once: the server sees that long before it has answered."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def proposal(server: LiveServer) -> str:
    answer = server.client.post("/generate/phi3/", json=PROMPT)
    assert answer.status_code == 200
    return answer.text


def saved(folder: Path) -> set[str]:
    """The names that the next start of each sidecar reads."""
    return {file.read_text() for file in folder.glob("**/phi3_adapter")}


def wait_for_date(server: LiveServer, date: str) -> None:
    """Returns when every sidecar uses the adapter of that date."""
    server.wait_until(lambda: {h["phi3_adapter_date"] for h in server.healths()} == {date})


def test_an_adapter_is_switched_refused_and_saved(
    adapters: Path, random_models: dict[str, str], tmp_path: Path
) -> None:
    with running(tmp_path, adapters, random_models) as server:
        assert swap(server, "20260101") == (200, "2026-01-01")
        wait_for_date(server, "2026-01-01")
        first = proposal(server)
        assert swap(server, "20260102") == (200, "2026-01-02")
        wait_for_date(server, "2026-01-02")
        second = proposal(server)
        assert second != first
        # The newest one is half written.
        status, why = swap(server)
        assert status == 409
        assert "20260103" in why
        assert ADAPTER_FILE in why
        status, why = swap(server, "20250101")
        assert status == 409
        # The name is the caller's, so it is not repeated.
        assert why.startswith("There is no such adapter: PHI3_ADAPTER_DIR holds no folder")
        assert swap(server, "../20260101")[0] == 422
        assert all(proposal(server) == second for _ in server.sidecars)
        wait_for_date(server, "2026-01-02")
        server.wait_until(lambda: saved(tmp_path) == {"20260102"})
    with running(tmp_path, adapters, random_models) as server:
        wait_for_date(server, "2026-01-02")
        assert all(proposal(server) == second for _ in server.sidecars)
        # Back again.
        assert swap(server, "20260101") == (200, "2026-01-01")
        wait_for_date(server, "2026-01-01")
        assert all(proposal(server) == first for _ in server.sidecars)


@pytest.mark.not_on("ray", "its proxy drops a request whose client has disconnected at once")
def test_a_swap_whose_client_disconnects_is_completed_and_saved(
    adapters: Path, random_models: dict[str, str], tmp_path: Path
) -> None:
    with running(tmp_path, adapters, random_models) as server:
        before = proposal(server)
        ask_and_go(server, "/adapters/swap", {"adapter": "20260101"})
        server.wait_until(lambda: saved(tmp_path) == {"20260101"})
        wait_for_date(server, "2026-01-01")
        assert {health["models"]["phi3"]["state"] for health in server.healths()} == {"ready"}
        assert proposal(server) != before


@pytest.mark.own_process("reads the log")
def test_every_swap_and_every_refusal_is_one_line(
    adapters: Path, random_models: dict[str, str], tmp_path: Path
) -> None:
    with running(tmp_path, adapters, random_models) as server:
        for name in ("20260101", "20260102", None, "20250101"):
            swap(server, name)
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    swaps = [line for line in lines if "previous_adapter" in line]
    assert [(x["model"], x["previous_adapter"], x["adapter"]) for x in swaps] == [
        ("phi3", None, "20260101"),
        ("phi3", "20260101", "20260102"),
    ]
    assert all(line["seconds"] > 0 and line["request_id"] for line in swaps)
    refused = [x["message"] for x in lines if x["message"].startswith("phi3 keeps its adapter: ")]
    assert [("20260103" in said, "no such adapter" in said) for said in refused] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.own_process("counts the worker processes, and sends a signal")
def test_an_adapter_whose_files_cannot_be_read_is_refused_while_others_ask(
    adapters: Path, random_models: dict[str, str], tmp_path: Path
) -> None:
    file = Path(random_models["MICRO_LLM_MODEL_PATH"])
    folder = shutil.copytree(file.parent, tmp_path / "model")
    environ = random_models | {
        "MICRO_LLM_MODEL_PATH": str(folder),
        "MODEL_LOAD_TIMEOUT_SECONDS": "4",
        "SHUTDOWN_GRACE_SECONDS": "0",
    }
    with running(tmp_path, adapters, environ) as server, ThreadPoolExecutor() as threads:
        expected, pid = proposal(server), server.worker("phi3")
        # The worker that serves has read it; the next one waits for a writer.
        (folder / file.name).unlink()
        os.mkfifo(folder / file.name)
        swaps = [threads.submit(swap, server, "20260101") for _ in range(2)]
        while not any(one.done() for one in swaps):
            assert proposal(server) == expected
            time.sleep(0.1)  # for others on this machine
        refused = (
            409,
            "The adapter 20260101 is refused: it did not load within 4 s "
            "(MODEL_LOAD_TIMEOUT_SECONDS)",
        )
        # The other one was asked for before this one had failed, and does not load again.
        assert [one.result(timeout=4) for one in swaps] == [refused, refused]
        assert server.worker("phi3") == pid
        last = threads.submit(swap, server, "20260102")
        server.wait_until(lambda: len(children(server)) == 3)
        workers = children(server)
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert last.result() == (503, "The server is shutting down; try again.")
        assert not any(map(is_running, workers))


def children(server: LiveServer) -> list[int]:
    """The server's worker processes."""
    threads = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(pid) for thread in threads for pid in thread.read_text().split()]


async def test_a_swap_whose_caller_is_cancelled_is_completed_and_saved(
    adapters: Path, random_models: dict[str, str], tmp_path: Path
) -> None:
    settings = Settings.from_environ(
        random_models
        | {
            "PHI3_ADAPTER_DIR": str(adapters),
            "LANCEDB_URI": str(tmp_path / "lancedb"),
            "REDIS_URL": "memory://",
        }
    )
    sidecar = Sidecar(settings)
    await sidecar.start()
    try:
        asking = asyncio.create_task(sidecar.adapters.swap("20260101"))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert sidecar.adapters.date() is None
        async with asyncio.timeout(30):
            while saved(tmp_path) != {"20260101"}:
                await asyncio.sleep(0.02)
        assert str(sidecar.adapters.date()) == "2026-01-01"
    finally:
        await sidecar.close()


def test_an_adapter_may_be_a_link_to_another_folder(tmp_path: Path) -> None:
    adapters, elsewhere = tmp_path / "adapters", tmp_path / "elsewhere"
    for folder in (adapters, elsewhere):
        folder.mkdir()
    (elsewhere / "adapter_config.json").touch()
    (adapters / "20260101").symlink_to(elsewhere)
    (adapters / "20260102").symlink_to(tmp_path / "nowhere")
    (adapters / "20260103").symlink_to(adapters / "20260103")
    assert loader.get_latest_adapter_dir(adapters) == adapters / "20260101"
    with pytest.raises(AdapterRejected, match=r"^There is no such adapter: "):
        loader.find_adapter_dir(adapters, "20260103")


def test_an_adapter_that_may_not_be_read_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "20260101").mkdir()

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert loader.get_latest_adapter_dir(tmp_path) == tmp_path / "20260101"


def test_digits_of_other_scripts_are_no_date(tmp_path: Path) -> None:
    folder = tmp_path / "٢٠٢٦٠١٠١"
    folder.mkdir()
    (folder / "adapter_config.json").touch()
    assert loader.get_latest_adapter_dir(tmp_path) is None

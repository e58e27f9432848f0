"""A running server whose model never finishes loading: which requests wait, how long, and their
errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.live_server import LiveServer, serve

PROMPT = {"prompt": "Long ABC from 100, now 112.5."}


@contextlib.contextmanager
def never_loaded(folder: Path, models: dict[str, str]) -> Iterator[LiveServer]:
    """A server whose Phi-3 is there and never loads."""
    file = Path(models["MICRO_LLM_MODEL_PATH"])
    model = shutil.copytree(file.parent, folder / "model")
    (model / file.name).unlink()
    # A worker that opens it waits for a writer.
    os.mkfifo(model / file.name)
    environ = models | {
        "MICRO_LLM_MODEL_PATH": str(model),
        "REQUEST_TIMEOUT_SECONDS": "2",
        "SHUTDOWN_GRACE_SECONDS": "60",
    }
    with serve(folder, **environ) as server:
        server.wait_until_ready()
        yield server


def ask(server: LiveServer) -> httpx.Response:
    return httpx.post(f"{server.url}/generate/phi3/", json=PROMPT, timeout=60)


@pytest.mark.not_on("ray", "a replica starts when its model is loaded")
def test_a_request_waits_for_a_loading_model_until_its_deadline(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    def are_loading() -> bool:
        states = {health["models"]["phi3"]["state"] for health in server.healths()}
        return states == {"loading"}

    with never_loaded(tmp_path, random_models) as server, ThreadPoolExecutor() as threads:
        began = time.monotonic()
        answers = [threads.submit(ask, server) for _ in range(2 * len(server.sidecars))]
        server.wait_until(are_loading)
        assert server.client.get("/health/ready").status_code == 200
        for response in (answer.result() for answer in answers):
            assert response.status_code == 503
            assert response.json() == {"detail": "The phi3 model is still loading."}
            assert int(response.headers["Retry-After"]) == 5
        assert time.monotonic() - began > 1.9
        # It has taken longer than a request waits.
        assert server.client.get("/health/ready").json() == {
            "status": "unavailable",
            "missing": ["phi3"],
            "reasons": {"phi3": "The phi3 model is loading."},
        }


@pytest.mark.own_process("sends a signal")
def test_a_request_that_waits_for_a_loading_model_ends_with_the_server(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    with never_loaded(tmp_path, random_models) as server, ThreadPoolExecutor() as threads:
        last = threads.submit(ask, server)
        server.wait_until(lambda: server.total("models", "phi3", "requests") == 1)
        server.process.terminate()
        response = last.result(timeout=30)
        assert response.status_code == 503
        assert response.json() == {"detail": "The server is shutting down; try again."}
        assert server.stop() == 0

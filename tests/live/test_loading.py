"""A running server whose model never finishes loading: which requests wait, how long, and their
errors."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.live_server import serve

PROMPT = {"prompt": "Long ABC from 100, now 112.5."}


def test_a_request_waits_for_a_loading_model_until_its_deadline_or_the_shutdown(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    file = Path(random_models["MICRO_LLM_MODEL_PATH"])
    folder = shutil.copytree(file.parent, tmp_path / "model")
    (folder / file.name).unlink()
    # A worker that opens it waits for a writer.
    os.mkfifo(folder / file.name)
    environ = random_models | {
        "MICRO_LLM_MODEL_PATH": str(folder),
        "REQUEST_TIMEOUT_SECONDS": "2",
        "SHUTDOWN_GRACE_SECONDS": "60",
    }
    with serve(tmp_path, **environ) as server, ThreadPoolExecutor() as threads:
        server.wait_until_ready()

        def ask() -> httpx.Response:
            return server.client.post("/generate/phi3/", json=PROMPT)

        began = time.monotonic()
        answers = [threads.submit(ask) for _ in range(2)]
        server.wait_until(
            lambda: server.client.get("/health").json()["models"]["phi3"]["state"] == "loading"
        )
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

        def waiting() -> int:
            count: int = server.client.get("/health").json()["models"]["phi3"]["requests"]
            return count

        last = threads.submit(ask)
        server.wait_until(lambda: waiting() == 1)
        server.process.terminate()
        response = last.result(timeout=30)
        assert response.status_code == 503
        assert response.json() == {"detail": "The server is shutting down; try again."}
        assert server.stop() == 0

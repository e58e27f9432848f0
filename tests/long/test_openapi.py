"""The server against its own OpenAPI document, with many random requests."""

from __future__ import annotations

from pathlib import Path

from tests.live_server import serve
from tests.schemathesis_run import find_faults

KEY = "a-key-of-the-tests-0123"


def test_many_requests_find_no_undocumented_answer(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    with serve(
        tmp_path,
        PRELOAD_MODELS="true",
        SIDECAR_API_KEYS=KEY,
        ENABLE_METRICS="true",
        ENABLE_PROFILING="true",
        REQUEST_TIMEOUT_SECONDS="0.3",
        **random_models,
    ) as server:
        server.wait_until_ready()
        faults = find_faults(server.url, KEY, tmp_path, random_requests=100)
        assert not faults, faults
        assert server.client.get("/health/ready").status_code == 200
        assert "Traceback" not in server.log.read_text()

"""`/health` and `/health/ready`: what they show, with and without a key."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import llm_sidecar
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from tests.unit.asgi import client

KEY = "first-key-0123456789"
OPENING = "The database is being opened."
Made = Callable[..., httpx.AsyncClient]


@pytest.fixture
def made(app_of: Callable[..., FastAPI]) -> Made:
    """Makes clients of apps whose components are created but not started."""

    def make(**environ: str) -> httpx.AsyncClient:
        app = app_of(SIDECAR_DEMO="true", **environ)
        variables = {"REDIS_URL": "memory://", "SIDECAR_DEMO": "true", **environ}
        app.state.sidecar = Sidecar(Settings.from_environ(variables))
        return client(app)

    return make


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer x"}])
async def test_health_without_a_valid_key_has_only_the_status(
    made: Made, headers: dict[str, str]
) -> None:
    async with made(SIDECAR_API_KEYS=f"desk={KEY}") as asking:
        for path in ("/health", "/health/"):
            response = await asking.get(path, headers=headers)
            assert (response.status_code, response.json()) == (200, {"status": "partial_error"})


@pytest.mark.parametrize(
    ("environ", "headers"),
    [
        ({}, {}),
        ({"SIDECAR_API_KEYS": KEY}, {"X-API-Key": KEY}),
        ({"SIDECAR_API_KEYS": f"desk={KEY}"}, {"Authorization": f"Bearer {KEY}"}),
    ],
)
async def test_health_with_a_key_or_without_configured_keys_is_complete(
    made: Made, environ: dict[str, str], headers: dict[str, str]
) -> None:
    async with made(**environ) as asking:
        shown = (await asking.get("/health", headers=headers)).json()
    assert shown["status"] == "partial_error"
    assert shown["version"] == llm_sidecar.__version__
    assert shown["models"]["phi3"]["state"] == "unloaded"
    assert shown["database"]["state"] == "opening"


async def test_uptime_counts_from_the_start_of_the_server(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.monotonic
    async with made() as asking:
        first = (await asking.get("/health")).json()["uptime_seconds"]
        assert 0 <= first < 60
        monkeypatch.setattr(time, "monotonic", lambda: real() + 1000)
        later = (await asking.get("/health")).json()["uptime_seconds"]
    assert 1000 <= later - first < 1060


async def test_the_document_has_both_shapes_of_health(made: Made) -> None:
    async with made() as asking:
        document = (await asking.get("/openapi.json")).json()
    answer = document["paths"]["/health"]["get"]["responses"]["200"]
    shapes = answer["content"]["application/json"]["schema"]["anyOf"]
    assert shapes == [
        {"$ref": "#/components/schemas/Health"},
        {"$ref": "#/components/schemas/HealthSummary"},
    ]
    schemas = document["components"]["schemas"]
    assert schemas["HealthSummary"]["required"] == ["status"]
    assert {"version", "uptime_seconds"} <= set(schemas["Health"]["required"])


NO_PHI3 = {"MICRO_LLM_MODEL_PATH": "/nowhere/phi3.onnx"}


@pytest.mark.parametrize(
    ("environ", "missing"),
    [({}, ["database"]), (NO_PHI3, ["phi3", "database"])],
)
async def test_ready_names_what_is_missing_and_why(
    made: Made, environ: dict[str, str], missing: list[str]
) -> None:
    async with made(**environ) as asking:
        response = await asking.get("/health/ready")
    assert response.status_code == 503
    said: dict[str, Any] = response.json()
    assert (said["status"], said["missing"]) == ("unavailable", missing)
    assert list(said["reasons"]) == missing
    assert said["reasons"]["database"] == OPENING
    if "phi3" in missing:
        assert "MICRO_LLM_MODEL_PATH" in said["reasons"]["phi3"]


async def test_the_reasons_need_a_key_if_keys_are_configured(made: Made) -> None:
    async with made(SIDECAR_API_KEYS=KEY) as asking:
        response = await asking.get("/health/ready")
        assert response.status_code == 503
        assert response.json() == {"status": "unavailable", "missing": ["database"]}
        shown = await asking.get("/health/ready", headers={"X-API-Key": KEY})
        assert shown.json()["reasons"] == {"database": OPENING}


async def test_live_has_only_a_status(made: Made) -> None:
    async with made(SIDECAR_API_KEYS=KEY) as asking:
        assert (await asking.get("/health/live")).json() == {"status": "ok", "missing": []}

"""`/v1/models`."""

from __future__ import annotations

import httpx

MODELS = [
    {"id": name, "object": "model", "created": 0, "owned_by": "osiris", "parent": None}
    for name in ("phi3", "hermes")
]


async def test_the_list_has_both_models(asking: httpx.AsyncClient) -> None:
    for slash in ("", "/"):
        response = await asking.get(f"/v1/models{slash}")
        assert response.json() == {"object": "list", "data": MODELS}


async def test_one_model_is_shown(asking: httpx.AsyncClient) -> None:
    assert (await asking.get("/v1/models/hermes")).json() == MODELS[1]

"""A minimal FastAPI app, for comparison."""

from __future__ import annotations

from fastapi import FastAPI

app = FastAPI()


@app.get("/health")
@app.get("/health/live")
async def health() -> dict[str, str]:
    return {"status": "ok"}

"""Starts a sidecar for clients, and defines the requests of their tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from tests.live_server import ROOT, LiveServer, serve

PYTHON: Final = ROOT / ".venv" / "bin" / "python"
"""The Python of the environment with the sidecar's packages."""
KEY: Final = "a-key-of-the-tests-0123"
PROMPT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run."
MESSAGES: Final = [{"role": "user", "content": PROMPT}]


class Position(BaseModel):
    """An answer format of a client. Each text is bounded, so that it ends with any weights."""

    ticker: str = Field(pattern="^[A-Z]{1,5}$")
    shares: int = Field(ge=0, le=999)
    is_long: bool


@contextlib.contextmanager
def demo_sidecar(folder: Path, **environ: str) -> Iterator[LiveServer]:
    """A sidecar with loaded demo models, which needs `KEY`."""
    with serve(
        folder,
        python=str(PYTHON),
        SIDECAR_DEMO="true",
        PRELOAD_MODELS="true",
        SIDECAR_API_KEYS=KEY,
        **environ,
    ) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        server.wait_until_ready()
        yield server

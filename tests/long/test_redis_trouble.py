"""Requests at a steady rate while Redis is in trouble: none fails, and afterwards the stream has
every event once and in order. `REDIS_TROUBLE_SECONDS` is how long each trouble lasts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.redis_server import require_redis
from tests.redis_trouble import TROUBLES, sidecar

SECONDS = float(os.environ.get("REDIS_TROUBLE_SECONDS", "3"))


@pytest.mark.parametrize("kind", TROUBLES)
async def test_no_request_fails_and_no_event_is_lost(kind: str, tmp_path: Path) -> None:
    require_redis()
    async with sidecar(tmp_path) as troubled:
        async with troubled.trouble(kind):
            await troubled.load.run(SECONDS)
            # Otherwise there was no trouble.
            assert await troubled.events_waiting() > 0
        await troubled.recovered()
        await troubled.load.run(1.0)
        await troubled.recovered()
        troubled.check()

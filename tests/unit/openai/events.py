"""The events of a stream of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any

import httpx


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of all events before `[DONE]`, which has to be the last one."""
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *data, last = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert last == "[DONE]"
    return [json.loads(one) for one in data]

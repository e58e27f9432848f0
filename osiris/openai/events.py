"""Server-sent events of the OpenAI API, which have data and no names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from sse_starlette import ServerSentEvent

DONE: Final = ServerSentEvent(data="[DONE]")
"""The end of a stream."""


def json_event(data: Mapping[str, Any]) -> ServerSentEvent:
    """An event with this object."""
    return ServerSentEvent(data=json.dumps(data, ensure_ascii=False, separators=(",", ":")))

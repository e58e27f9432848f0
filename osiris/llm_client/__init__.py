"""The Python client for other Osiris services, blocking and async.

    with LLMClient() as client:
        answer = client.generate("phi3", "AAPL at 190, long from 185, stop 180")

    async with AsyncLLMClient() as client:
        answer = await client.generate("phi3", "AAPL at 190, long from 185, stop 180")

Both retry requests that may succeed later, and return the sidecar's JSON unchanged. A redirect is
not followed but raised as an error, so that the key goes to no other host.

Threads may share an `LLMClient`, tasks of one event loop an `AsyncLLMClient`. Both use the proxy
from `HTTP_PROXY`, `HTTPS_PROXY` or `ALL_PROXY`, unless `NO_PROXY` contains the sidecar's host. This
also holds for localhost. A client reads these variables when it is created.
"""

from __future__ import annotations

from osiris.llm_client.asynchronous import AsyncLLMClient
from osiris.llm_client.blocking import LLMClient
from osiris.llm_client.errors import (
    LLMClientConnectionError,
    LLMClientError,
    LLMClientHTTPError,
)
from osiris.llm_client.generation_events import (
    Assessment,
    Done,
    GenerationEvent,
    Proposal,
    Token,
)
from osiris.llm_client.server_sent_events import Event

__all__ = [
    "Assessment",
    "AsyncLLMClient",
    "Done",
    "Event",
    "GenerationEvent",
    "LLMClient",
    "LLMClientConnectionError",
    "LLMClientError",
    "LLMClientHTTPError",
    "Proposal",
    "Token",
]

"""A connection to a llama.cpp server, which another thread may cancel.

connection = server.connect()
connection.post("/tokenize", {"content": "Hi."})
for event in connection.events("/completion", {...}):
    ...
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llm_sidecar.errors import ModelUnavailable


class Connection:
    """Sends requests one after the other.

    Attributes:
        is_cancelled: whether `cancel` was called.
    """

    def __init__(self, port: int, key: str, seconds: float) -> None:
        """Connects with the first request.

        Args:
            key: of the server.
            seconds: the time limit for each part of an answer.
        """
        self.is_cancelled = False
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def get(self, path: str) -> bytes:
        """The answer to a GET request; raises as `post`."""
        return self._send("GET", path, None).read()

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The answer to a POST request.

        Raises:
            ModelUnavailable: the server answers with an error.
            OSError, http.client.HTTPException: the connection fails, is cancelled or takes too
                long.
        """
        return self._send("POST", path, body).read()

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events that answer a POST request; raises as `post`."""
        yield from read_events(self._send("POST", path, body))
        # llama.cpp closes the connection after a stream, without announcing it.
        self._http.close()

    def cancel(self) -> None:
        """Ends the connection, so that the server cancels its request; called in another thread."""
        self.is_cancelled = True
        if self._http.sock is not None:
            with contextlib.suppress(OSError):
                self._http.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection."""
        self._http.close()

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        content = None if body is None else json.dumps(body).encode()
        self._http.request(method, path, content, self._headers)
        # Check after connecting: `cancel` may have come before there was a socket.
        if self.is_cancelled:
            raise ConnectionAbortedError("the request was cancelled")
        response = self._http.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise _error(response.read())
        return response


def read_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events.

    Raises:
        ModelUnavailable: one of them is an error.
    """
    for line in lines:
        name, _, value = line.partition(b":")
        if name == b"error":
            raise _error(value)
        if name == b"data" and value.strip() != b"[DONE]":
            event: dict[str, Any] = json.loads(value)
            if "error" in event:
                raise _error(value)
            yield event


def _error(answer: bytes) -> ModelUnavailable:
    """The error in an answer: its type only, because the message may quote a prompt."""
    kind = "unknown"
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        error = json.loads(answer)
        kind = error.get("error", error)["type"]
    return ModelUnavailable(f"llama.cpp answers with an error: {kind}")

"""The messages of a worker to the server, and the jobs that the server has cancelled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

import msgspec

from llm_sidecar.models.local.failures import failed
from llm_sidecar.models.local.protocol import Done, encode


class Outbox:
    """Sends messages; threads may share it.

    Attributes:
        cancelled: the jobs that the server has cancelled, and does not know to have ended. The id
            of a finished job may stay in it, which is harmless.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Args: file: where the messages are written."""
        self.cancelled: set[int] = set()
        self._file = file

    def send(self, message: msgspec.Struct) -> None:
        """Sends a message at once."""
        self.write(message)
        self.flush()

    def write(self, message: msgspec.Struct) -> None:
        """Sends a message with the next `flush`."""
        self._file.write(encode(message))

    def flush(self) -> None:
        """Sends the messages that were written."""
        self._file.flush()

    def fail(self, number: int, error: Exception) -> None:
        """Ends a job with an error."""
        self.send(failed(number, error))

    def end_cancelled(self, number: int) -> bool:
        """Ends a job if it was cancelled; returns whether it was."""
        if number not in self.cancelled:
            return False
        self.cancelled.discard(number)
        self.send(Done(id=number))
        return True


@contextlib.contextmanager
def ending_without_server() -> Iterator[None]:
    """Ends this process when the server, which reads its output, has ended."""
    try:
        yield
    except BrokenPipeError:
        os._exit(0)

"""A transport that resets a connection whose client reads nothing, and that closes without losing
the last answer."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import termios
from collections.abc import Callable
from typing import Any, Final

_CHECKS: Final = 8
"""Number of checks for progress within `stall_seconds`."""
_LINGER_SECONDS: Final = 2.0
_LINGER_BYTES: Final = 1 << 20


class WatchedTransport:
    """The part of `asyncio.Transport` that the HTTP protocol uses.

    Aborts the connection if bytes wait for the client and it has acknowledged none of them for
    `stall_seconds`. That frees their memory. A slow client that makes any progress is not affected.

    Args:
        stall_seconds: how long a client may make no progress.
        still_sending: whether the client may still be sending a request.
        on_stall: called once, before such a connection is aborted.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        stall_seconds: float,
        still_sending: Callable[[], bool],
        on_stall: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._stall_seconds = stall_seconds
        self._still_sending = still_sending
        self._on_stall = on_stall
        self._written = 0
        self._delivered = 0
        self._progress_at = 0.0
        self._check: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._discarded = 0

    def write(self, data: bytes) -> None:
        if self._linger is not None:
            return
        self._written += len(data)
        self._transport.write(data)
        if self._check is None:
            self._progress_at = self._loop.time()
            self._schedule()

    def close(self) -> None:
        """Closes once everything is written.

        If the client is still sending, only the server's sending side closes at first, and further
        bytes are discarded: the kernel replies with a reset to bytes that arrive on a closed
        socket, and a reset can make the client lose the answer.
        """
        if self.is_closing():
            return
        if not self._still_sending():
            self._transport.close()
            return
        self._linger = self._loop.call_later(_LINGER_SECONDS, self._transport.close)
        # TLS has no half-closed connections.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def discard(self, size: int) -> None:
        """Counts bytes that arrive after `close`; closes at once if they are too many."""
        self._discarded += size
        if self._discarded > _LINGER_BYTES:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def unsent(self) -> int:
        """Bytes that wait for the kernel to take them."""
        return self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._linger is not None or self._transport.is_closing()

    def lost(self) -> None:
        """Stops the timers; call it when the connection is lost."""
        for timer in (self._check, self._linger):
            if timer is not None:
                timer.cancel()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def _schedule(self) -> None:
        delay = self._stall_seconds / _CHECKS
        self._check = self._loop.call_later(delay, self._check_progress)

    def _check_progress(self) -> None:
        self._check = None
        waiting = self._transport.get_write_buffer_size() + self._in_kernel()
        if not waiting:
            return
        delivered = self._written - waiting
        now = self._loop.time()
        if delivered > self._delivered:
            self._delivered = delivered
            self._progress_at = now
        elif now - self._progress_at >= self._stall_seconds:
            self._on_stall()
            self._transport.abort()
            return
        self._schedule()

    def _in_kernel(self) -> int:
        """Bytes in the kernel's send buffer that the client's kernel has not acknowledged.

        This buffer can hold megabytes, so asyncio's own buffer alone does not show progress. 0 if
        the system does not report it.
        """
        unsent = array.array("i", [0])
        with contextlib.suppress(OSError):
            descriptor = self._transport.get_extra_info("socket").fileno()
            fcntl.ioctl(descriptor, termios.TIOCOUTQ, unsent)
        return unsent[0]

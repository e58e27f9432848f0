"""Closing a listening socket without resetting a connection that the kernel has already completed.

A kernel completes connections before the server accepts them. When the socket closes, it resets
those that still wait. So the server blocks new connections and accepts the waiting ones before it
closes the socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import struct
import sys
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_ATTACH_FILTER: Final = 26
"""SO_ATTACH_FILTER of socket(7), which the socket module does not name."""
_DROP_SYN: Final = (
    (0x30, 0, 0, 13),  # load byte 13 of the TCP header: its flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN without ACK: the start of a connection
    (0x06, 0, 0, 0),  # is dropped
    (0x06, 0, 0, 0xFFFFFFFF),  # everything else passes
)
"""A classic BPF program, as (code, jump if true, jump if false, constant)."""
_LISTEN: Final = 10
"""TCP_LISTEN, a state of tcp(7)."""
_INFO_BYTES: Final = 104
_WAITING_AT: Final = 24
"""Offset of `tcpi_unacked` in struct tcp_info: on a listening socket, the connections that wait."""


def block_new(listener: socket.socket) -> bool:
    """Blocks new connections; a handshake that has begun can still finish.

    The first packet of a new connection is dropped. The client's system sends it again after a
    second, and is refused if the socket is closed by then. No other process may use the socket,
    because the filter cannot be limited to this one.

    Returns:
        Whether it worked: on Linux with TCP, and with a Unix socket.
    """
    if listener.family == socket.AF_UNIX:
        with contextlib.suppress(FileNotFoundError):
            Path(listener.getsockname()).unlink()
        return True
    if sys.platform != "linux":
        return False
    program = b"".join(struct.pack("HBBI", *line) for line in _DROP_SYN)
    buffer = ctypes.create_string_buffer(program)
    option = struct.pack("HL", len(_DROP_SYN), ctypes.addressof(buffer))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, option)
    except OSError as error:
        log.info("new connections cannot be blocked before the socket closes: %s", error)
        return False
    return True


def waiting(listener: socket.socket) -> int:
    """The number of connections that wait to be accepted; 0 if the system does not report it."""
    if sys.platform != "linux" or listener.family == socket.AF_UNIX:
        return 0
    try:
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return 0
    if len(info) < _INFO_BYTES or info[0] != _LISTEN:
        return 0
    (count,) = struct.unpack_from("I", info, _WAITING_AT)
    return int(count)

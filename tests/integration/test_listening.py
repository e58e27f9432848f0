"""A listening socket closes without resetting a connection that the kernel has completed."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from osiris.listening import block_new, waiting

linux = pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux sockets")


@linux
@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_existing_connections_are_served_and_new_ones_are_blocked(
    family: socket.AddressFamily, host: str
) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        address = listener.getsockname()[:2]
        with socket.create_connection(address) as early, socket.socket(family) as late:
            assert waiting(listener) == 1
            assert block_new(listener)
            late.settimeout(0.3)
            with pytest.raises(TimeoutError):
                late.connect(address)
            connection, _ = listener.accept()
            assert waiting(listener) == 0
            with connection:
                early.sendall(b"request")
                assert connection.recv(100) == b"request"
                connection.sendall(b"answer")
                assert early.recv(100) == b"answer"
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 5)


def test_a_unix_socket_is_unlinked(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as early:
        listener.bind(path)
        listener.listen()
        early.connect(path)
        assert block_new(listener)
        assert block_new(listener)
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
            late.connect(path)
        connection, _ = listener.accept()
        with connection:
            early.sendall(b"request")
            assert connection.recv(100) == b"request"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_does_not_listen_has_no_waiting_connections(kind: socket.SocketKind) -> None:
    with socket.socket(type=kind) as other:
        assert waiting(other) == 0

"""The ports that Ray opens: closes one, and checks all."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_LISTENING: Final = "0A"
_PROC: Final = Path("/proc")


def listen_on_this_node_only() -> None:
    """Lets Ray Serve open the gRPC port of this replica on the node's address only.

    Serve 2.60 listens on all interfaces, without a password, for a transport between deployments
    that is off by default (`ray/serve/_private/replica.py`, `_on_initialized`). A replica calls
    this before it opens the port. `exposed` says whether it has helped.
    """
    from ray.serve._private import replica
    from ray.util import get_node_ip_address

    add_port = replica.add_port_to_grpc_server

    def add_port_of_this_node(server: Any, address: str) -> int:
        port: int = add_port(server, address.replace("[::]", get_node_ip_address()))
        return port

    if add_port.__name__ != add_port_of_this_node.__name__:
        replica.add_port_to_grpc_server = add_port_of_this_node


def exposed(process: int) -> list[str]:
    """The TCP addresses on which a process or its descendants listen beyond loopback."""
    tables = [(_PROC / "net" / name).read_text() for name in ("tcp", "tcp6")]
    listening = dict(entry for table in tables for entry in _listening(table))
    return sorted(
        f"{address} (process {pid})"
        for pid in tree(process)
        for inode in _sockets(pid)
        if (address := listening.get(inode)) is not None and not _is_loopback(address)
    )


def _listening(table: str) -> Iterator[tuple[str, str]]:
    """(inode, address and port) of each listening socket in a table of /proc/net."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTENING:
            host, _, port = fields[1].partition(":")
            yield fields[9], f"{_address(host)}:{int(port, 16)}"


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address of /proc/net: words of 4 bytes in the byte order of the machine."""
    words = [text[start : start + 8] for start in range(0, len(text), 8)]
    packed = b"".join(bytes.fromhex(word)[::-1] for word in words)
    return ipaddress.ip_address(packed)


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address.rpartition(":")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


def tree(process: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [process]
    for pid in found:
        found += children.get(pid, [])
    return found


def _sockets(process: int) -> Iterator[str]:
    """The inodes of the sockets of a process."""
    try:
        for file in (_PROC / str(process) / "fd").iterdir():
            kind, _, inode = str(file.readlink()).partition(":[")
            if kind == "socket":
                yield inode.rstrip("]")
    except OSError:
        return  # it has ended

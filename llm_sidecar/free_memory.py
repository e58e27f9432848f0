"""How much memory this process may still take: of the machine, and of its control group."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_AVAILABLE: Final = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)
_RECLAIMABLE: Final = re.compile(r"^inactive_file (\d+)", re.MULTILINE)
_GROUPS: Final = {
    # Controllers in /proc/self/cgroup: subfolder of the file system, limit, use. See cgroups(7).
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may take before the system swaps or kills; None if unknown.

    Pages of files that nobody has used for a while count as free.

    Args:
        proc, groups: where the kernel's file systems are mounted.
    """
    available = _AVAILABLE.search(_text(proc / "meminfo"))
    if available is None:
        return None
    return max(0, min(int(available[1]) * 1024, *_below_limits(proc, groups), 1 << 62))


def _below_limits(proc: Path, groups: Path) -> Iterator[int]:
    """The bytes below each limit of the control group and of those above it."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        folder, limit, use = _GROUPS[controllers]
        root = groups / folder
        group = root / path.lstrip("/")
        # In a container the path may be that of the machine: then only the root is there.
        for one in (group, *group.parents):
            if one.is_relative_to(root) and (most := _text(one / limit).strip()).isdecimal():
                reclaimable = _RECLAIMABLE.search(_text(one / "memory.stat"))
                yield int(most) - int(_text(one / use)) + int(reclaimable[1] if reclaimable else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

"""Whether this processor has instructions that multiply bfloat16."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")
_FLAGS: Final = re.compile(r"^flags\s*:(.*)$", re.MULTILINE)
_VECTORS: Final = "avx512_bf16"
_TILES: Final = "amx_bf16"


def multiplies_bfloat16(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether it multiplies bfloat16 at all; torch emulates that elsewhere, which is slow."""
    return not {_VECTORS, _TILES}.isdisjoint(_flags(cpuinfo))


def multiplies_bfloat16_in_tiles(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether it has AMX, which multiplies bfloat16 several times as fast as vectors do."""
    return _TILES in _flags(cpuinfo)


def _flags(cpuinfo: Path) -> frozenset[str]:
    """The flags of the first processor, as Linux names those of x86; none elsewhere."""
    try:
        found = _FLAGS.search(cpuinfo.read_text(errors="replace"))
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()

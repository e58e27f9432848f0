"""Which processors multiply bfloat16, by what Linux says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.engines.processor import multiplies_bfloat16, multiplies_bfloat16_in_tiles


@pytest.mark.parametrize(
    ("cpuinfo", "at_all", "in_tiles"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_vnni\n", False, False),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 clzero\n", True, False),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True, True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16_of_old\n", False, False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False, False),
    ],
)
def test_the_flags_say_it(tmp_path: Path, cpuinfo: str, at_all: bool, in_tiles: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    assert (multiplies_bfloat16(file), multiplies_bfloat16_in_tiles(file)) == (at_all, in_tiles)


def test_without_linux_it_does_not(tmp_path: Path) -> None:
    assert not multiplies_bfloat16(tmp_path / "none")

"""Reads the header of a GGUF file: its metadata, and whether all tensors are there.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from llm_sidecar.errors import ModelUnavailable

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""The format of a value, by its type."""
_STRING: Final = 8
_ARRAY: Final = 9
_ALIGNMENT: Final = 32
_MOST_DIMENSIONS: Final = 4
_BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Values and bytes of a block, by tensor type; the size of other types is unknown."""


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a file whose tensors are all there.

    Raises:
        ModelUnavailable: it is not a whole GGUF file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelUnavailable(f"{path.name} is not a GGUF file")
        file.seek(0)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content)
            try:
                version, tensors, pairs = reader.take("<I"), reader.take("<Q"), reader.take("<Q")
                if version not in _VERSIONS:
                    raise ModelUnavailable(f"{path.name} {_version_problem(version)}")
                header = dict(reader.pair() for _ in range(pairs))
                end = max(reader.tensor_ends(tensors), default=0)
                alignment = header.get("general.alignment", _ALIGNMENT)
                data = -(-reader.position // alignment) * alignment
                if data + end > len(content):
                    raise EOFError
            except (EOFError, struct.error):
                raise ModelUnavailable(
                    f"{path.name} is cut off after {len(content)} bytes; download it again"
                ) from None
            except (KeyError, TypeError, ValueError, RecursionError, ZeroDivisionError):
                raise ModelUnavailable(f"{path.name} is damaged; download it again") from None
    return header


def _version_problem(version: int) -> str:
    if version & 0xFFFF == 0:
        return "is a GGUF file for big-endian processors"
    return f"has version {version} of GGUF, and versions 2 and 3 can be read; convert it again"


class _Reader:
    """Reads the values of a header in their order."""

    def __init__(self, content: mmap.mmap) -> None:
        self.position = len(_MAGIC)
        self._content = content

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._content, self.position)
        self.position += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.take("<Q")
        begin, self.position = self.position, self.position + size
        if self.position > len(self._content):
            raise EOFError
        return self._content[begin : self.position].decode("utf-8", errors="replace")

    def pair(self) -> tuple[str, Any]:
        return self.text(), self._value(self.take("<I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("<I"), self.take("<Q")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner][1]}"
            values = struct.unpack_from(form, self._content, self.position)
            self.position += struct.calcsize(form)
            return list(values)
        return [self._value(inner) for _ in range(count)]

    def tensor_ends(self, count: int) -> Iterator[int]:
        """The end of each tensor, after the beginning of the first."""
        for _ in range(count):
            self.text()
            dimensions = self.take("<I")
            if dimensions > _MOST_DIMENSIONS:
                # It would take minutes to read them to the end of a large file.
                raise ValueError
            values = 1
            for _ in range(dimensions):
                values *= self.take("<Q")
            block, size = _BLOCKS.get(self.take("<I"), (1, 0))
            yield self.take("<Q") + values // block * size

"""What a conversion needs, and what this machine has free."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from llm_sidecar.engines.checkpoint import read_header, weight_files
from llm_sidecar.free_memory import free_memory
from llm_sidecar.models.conversion.builder import Precision
from llm_sidecar.models.conversion.errors import ConversionFailed

_IMPORTS: Final = 700 << 20
"""Bytes that a process takes with torch, transformers and onnxruntime alone."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model as they are stored.

    Attributes:
        size: of the files, in bytes.
        count: number of weights.
        largest: number of weights of the largest tensor.
    """

    size: int
    count: int
    largest: int


class Needs(NamedTuple):
    """Bytes of memory and of disk."""

    memory: int
    disk: int


def read_weights(source: Path) -> Weights:
    """Reads the headers of the *.safetensors that transformers loads from a folder.

    Raises:
        ConversionFailed: one of them cannot be read.
    """
    file = source
    size, shapes = 0, list[int]()
    try:
        for file in weight_files(source):
            size += file.stat().st_size
            shapes += [math.prod(tensor["shape"]) for tensor in _tensors(file)]
    except FileNotFoundError:
        raise ConversionFailed(f"{file} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConversionFailed(f"{file} is not a safetensors file, or incomplete") from error
    return Weights(size, sum(shapes), max(shapes, default=0))


def _tensors(file: Path) -> Collection[dict[str, Any]]:
    begin, tensors = read_header(file)
    if file.stat().st_size != begin + max(each["data_offsets"][1] for each in tensors.values()):
        raise ValueError("the file is not as long as its header says")
    return tensors.values()


def needs_of(weights: Weights, precision: Precision) -> Needs:
    """An upper estimate of what a conversion takes; docs/converting.md says what it rests on."""
    memory = _IMPORTS + weights.size + 12 * weights.largest
    # The head is written apart from the embedding, also where the source has one matrix for both.
    disk = 4 * (weights.count + weights.largest)
    if precision != "fp32":
        # The best result so far, and the one that is being made.
        disk += 2 * round(1.25 * weights.count)
    return Needs(memory, disk)


def check(needs: Needs, folder: Path) -> None:
    """Checks that this machine has enough.

    Args:
        folder: an existing one, on the disk of the result.

    Raises:
        ConversionFailed: it has less; says how much, and the way out.
    """
    memory = free_memory()
    if memory is not None and memory < needs.memory:
        raise ConversionFailed(
            f"converting takes {shown(needs.memory)} of memory, and {shown(memory)} are "
            "free; convert on a machine with more, or serve a GGUF of the model, which needs no "
            "conversion"
        )
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < needs.disk:
        raise ConversionFailed(
            f"converting takes {shown(needs.disk)} of disk under {folder}, and "
            f"{shown(free)} are free; name a folder on a larger disk, or serve a GGUF of the "
            "model, which needs no conversion"
        )


def shown(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

"""A transformers folder before it is loaded: how many weights it has, how they are quantized."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, Final

from llm_sidecar.errors import ModelUnavailable

_PACKAGES: Final = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes",),
}
"""The packages that transformers needs for each method beside those of the sidecar."""
_HEADER_LENGTH: Final = 8
"""Bytes of a safetensors file that give the length of its header."""
_MAX_HEADER: Final = 100_000_000
"""The format's own limit, in bytes."""


def quantization_method(folder: Path) -> str | None:
    """How the weights are quantized, as config.json calls it; None if they are not."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        found = config.get("quantization_config")
        return None if found is None else str(found.get("quant_method", "an unknown method"))
    except (OSError, ValueError, AttributeError):
        # transformers says what is wrong with it.
        return None


def check_packages(folder: Path) -> None:
    """Raises ModelUnavailable if the weights are quantized and a package for that is missing."""
    method = quantization_method(folder)
    needed = _PACKAGES.get(method or "", ())
    missing = [name for name in needed if not importlib.util.find_spec(name.replace("-", "_"))]
    if missing:
        raise cannot_load(folder, f"install {' and '.join(missing)}")


def cannot_load(folder: Path, reason: str) -> ModelUnavailable:
    """The error of a quantized checkpoint: what it is, why it does not load, and the way out."""
    return ModelUnavailable(
        f"{folder} is quantized with {quantization_method(folder)}, for a GPU: {reason}; or take "
        "the model's original weights, or a GGUF file of it"
    )


def count_weights(folder: Path) -> int:
    """The number of weights in the safetensors files that transformers loads.

    Raises:
        OSError, ValueError, LookupError, TypeError: a file is missing or not of that format.
    """
    return sum(
        math.prod(tensor["shape"])
        for file in weight_files(folder)
        for tensor in read_header(file)[1].values()
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads; a folder may hold other copies too.

    Raises:
        OSError, ValueError, LookupError, TypeError: the index is not of its format.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = set(json.loads(index.read_bytes())["weight_map"].values())
    return [folder / name for name in sorted(names)]


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the weights in a safetensors file begin, in bytes, and its tensors by name: `shape`
    and `data_offsets` of each.

    The format: https://huggingface.co/docs/safetensors.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is missing or not of that format.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_HEADER_LENGTH), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"{file} is not a safetensors file")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return _HEADER_LENGTH + length, header

"""Lets torch do the prefill of a model on onnxruntime, if that is possible and faster.

torch loads the same model in transformers' format from `transformers`, a folder or a link in the
folder of the ONNX model. Its weights are in memory beside those of the ONNX model.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llm_sidecar.engines.base import PrefillDtype
from llm_sidecar.engines.checkpoint import count_weights, quantization_method
from llm_sidecar.engines.processor import multiplies_bfloat16_in_tiles
from llm_sidecar.errors import ModelUnavailable, one_line
from llm_sidecar.free_memory import free_memory

if TYPE_CHECKING:
    from llm_sidecar.engines.ort import OrtEngine

log = logging.getLogger(__name__)

FOLDER: Final = "transformers"
_BYTES: Final = 2
"""Of a weight in bfloat16."""
_SPARE: Final = 1 << 30
"""Bytes that must stay free beside the weights: torch itself and a long prompt take 0.5 GB."""


def hand_over(engine: OrtEngine, folder: Path, dtype: PrefillDtype, threads: int) -> None:
    """Lets torch do the prefill of an engine, if that is possible and faster.

    Args:
        engine: the model on onnxruntime, loaded.
        folder: its folder; without `transformers` in it nothing happens.
        dtype: `auto` needs a processor with AMX and enough free memory; `bfloat16` does not.
        threads: of torch's operators.

    Raises:
        ModelUnavailable: `bfloat16` is asked for, and the transformers folder cannot be used.
    """
    source = folder / FOLDER
    if dtype == "off" or not (source.is_dir() or source.is_symlink()):
        return
    reason = _obstacle(source) or (_disadvantage(source) if dtype == "auto" else None)
    reason = reason or _load(engine, source, threads)
    if reason is None:
        log.info("prefill of %s runs on torch in bfloat16", folder.name)
    elif dtype == "auto":
        log.info("prefill of %s does not run on torch: %s", folder.name, reason)
    else:
        raise ModelUnavailable(f"PREFILL_DTYPE=bfloat16 cannot use {source}: {reason}")


def _load(engine: OrtEngine, source: Path, threads: int) -> str | None:
    """Loads the model and hands the prefill over to it; returns the reason if that fails."""
    from llm_sidecar.engines.torch_prefill import TorchPrefill

    try:
        return engine.hand_over(TorchPrefill(source, threads), source)
    except Exception as error:  # noqa: BLE001 - transformers raises bare ones
        return one_line(error)


def _obstacle(source: Path) -> str | None:
    """Why torch cannot do the prefill."""
    if not source.is_dir():
        return f"it is a link to {source.readlink()}, where there is no folder"
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return "torch or transformers is not installed"
    if (method := quantization_method(source)) is not None:
        return f"its weights are quantized with {method}"
    return None


def _disadvantage(source: Path) -> str | None:
    """Why prefill on torch would be no better."""
    if not multiplies_bfloat16_in_tiles():
        return "this processor has no AMX, without which onnxruntime is as fast"
    try:
        needed = _BYTES * count_weights(source) + _SPARE
    except (OSError, ValueError, LookupError, TypeError) as error:
        return one_line(error)
    free = free_memory()
    if free is not None and free < needed:
        return f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None

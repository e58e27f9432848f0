"""The steps of a conversion after the builder; the large ones have a process of their own."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from llm_sidecar.models.conversion import child
from llm_sidecar.models.conversion.options import Option
from llm_sidecar.models.conversion.quality import Measurement


def quantize(base: Path, out: Path, option: Option) -> int:
    """Writes a quantized copy of the model in `base`; returns the most memory that it took.

    Raises:
        ConversionFailed: it cannot be written.
    """
    module = "llm_sidecar.models.conversion.quantizer"
    arguments = [module, str(base), str(out), json.dumps(dataclasses.asdict(option))]
    return child.run(f"quantizing to {option.name}", arguments)


def measure(folder: Path, threads: int) -> tuple[Measurement, int]:
    """Measures the model in `folder`; also returns the most memory that it took, in bytes.

    Raises:
        ConversionFailed: the model cannot be measured.
    """
    module = "llm_sidecar.models.conversion.measure"
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        peak = child.run(f"measuring {folder}", [module, str(folder), file.name, str(threads)])
        return Measurement(**json.loads(file.read())), peak


def prune(graph: Path) -> None:
    """Makes a graph compute the logits of the last token only; prefill is a quarter faster.

    It cannot be measured after that.
    """
    # It takes 30 MB, which the unit tests and the other steps do not need.
    from llm_sidecar.models.conversion.pruned_head import prune_head

    prune_head(graph)

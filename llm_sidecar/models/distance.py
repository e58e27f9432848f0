"""How far an adapter moves a model's next-token probabilities."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines import load_engine
from llm_sidecar.models.conversion.sample_chats import SAMPLE_CHATS


def adapter_distance(model: Path, adapter: Path) -> float:
    """The mean total variation distance, 0 (equal) to 1, between the next-token probabilities with
    an adapter and without, on the sample chats.

    Args:
        model: folder of the model.
        adapter: folder of the adapter, in the runtime's own format.

    Raises:
        AdapterRejected: the model does not run with the adapter.
    """
    # One after the other, since both may not fit into memory.
    without, changed = _next_tokens(model, None), _next_tokens(model, adapter)
    apart = [
        float(np.abs(one - other).sum() / 2.0) for one, other in zip(without, changed, strict=True)
    ]
    return sum(apart) / len(apart)


def _next_tokens(folder: Path, adapter: Path | None) -> list[npt.NDArray[np.float64]]:
    """The probabilities of the token after each chat."""
    engine = load_engine(folder, device="cpu", threads=os.cpu_count() or 1, adapter=adapter)
    return [engine.next_token(chat)[1] for chat in SAMPLE_CHATS]

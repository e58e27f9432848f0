"""The logits of every position of a text; engines return those of the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.generation import Logits


def all_logits(engine: Decoder[Any], tokens: Sequence[int]) -> Logits:
    """The logits after each token, (tokens, vocabulary), without any tokens before."""
    if engine.runtime == "onnxruntime":
        return _of_session(engine.model, engine.new_states(0).arrays[0], tokens)
    if engine.runtime == "onnxruntime-genai":
        states = engine.new_states(len(tokens))
        states.append(tokens)
        return np.asarray(states.generator.get_output("logits")[0], np.float32)
    return _of_torch(engine.model, tokens)


def _of_session(session: Any, keys: npt.NDArray[Any], tokens: Sequence[int]) -> Logits:
    """`keys` is an array of states, (rows, heads, tokens, width)."""
    ids = np.array([tokens], np.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(len(tokens))[None],
    }
    taken = [each.name for each in session.get_inputs()]
    _, heads, _, width = keys.shape
    empty = np.empty((1, heads, 0, width), keys.dtype)
    (logits,) = session.run(["logits"], {name: inputs.get(name, empty) for name in taken})
    return np.asarray(logits[0], np.float32)


def _of_torch(model: Any, tokens: Sequence[int]) -> Logits:
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy())

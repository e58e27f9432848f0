"""Prefill on torch in bfloat16, for a decoder on another runtime.

A kernel may round differently for another number of tokens, but the states of a prompt must not
depend on how much of it was cached, so that a replay gives the same text. So blocks of a prompt
begin at multiples of `PREFILL_CHUNK`, and a block is computed as a whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Without this, loading a model creates a cache folder, although nothing is compiled.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, DynamicCache

from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.torch_states import GrowingLayer, rope_is_fixed


class TorchPrefill:
    """A transformers model without its head.

    Attributes:
        shape: number of layers, heads of keys, width of a head, size of the vocabulary.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        """Loads the model in bfloat16; weights that are stored so are mapped, not copied.

        Args:
            folder: config.json and *.safetensors.
            threads: of torch's operators.

        Raises:
            ValueError: its rotary embeddings depend on the length of the prompt.
            Exception: transformers cannot load it.
        """
        torch.set_num_threads(threads)
        self._model: Any = AutoModel.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
        config = self._model.config.get_text_config(decoder=True)
        if not rope_is_fixed(config):
            raise ValueError("its rotary embeddings depend on the length of the prompt")
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        self.shape = (config.num_hidden_layers, keys, width, config.vocab_size)

    def run(
        self, tokens: Sequence[int], arrays: Sequence[npt.NDArray[np.float32]], begin: int = 0
    ) -> Iterator[int]:
        """Computes the attention states of a prompt, block by block.

        Args:
            tokens: of the prompt.
            arrays: keys and values of each layer, (1, heads, tokens or more, width): those before
                `begin` are read, the others written.
            begin: a multiple of `PREFILL_CHUNK`.

        Yields:
            the number of tokens so far, after each block.
        """
        cache = _cache([torch.from_numpy(array[:, :, :begin]) for array in arrays])
        for start in range(begin, len(tokens), PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, len(tokens))
            ids = torch.tensor([tokens[start:stop]])
            with torch.inference_mode():
                self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                for array, states in zip(arrays, _tensors(cache), strict=True):
                    torch.from_numpy(array[:, :, start:stop]).copy_(states[:, :, start:stop])
            yield stop


def _cache(states: Sequence[torch.Tensor]) -> DynamicCache:
    """A cache with the keys and values of each layer."""
    cache = DynamicCache()
    for keys, values in zip(states[::2], states[1::2], strict=True):
        layer = GrowingLayer()
        if keys.shape[2]:
            # Exact, because they come from bfloat16.
            layer.update(keys.bfloat16(), values.bfloat16())
        cache.layers.append(layer)
    return cache


def _tensors(cache: DynamicCache) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        yield layer.keys
        yield layer.values

"""The source of a conversion on torch, in the precision of its files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import torch

from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.torch import TorchEngine, _chat_tokenizer, _load_model, _load_tokenizer

_HELD: Final = "_stored_weights"
_PART: Final = 1 << 22
"""Weights of a projection that are in float32 at a time."""


class SourceEngine(TorchEngine):
    """Computes in float32, with the weights of one module at a time in float32.

    So it is as exact as float32 on every processor, and memory holds the model once, as it is
    stored.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        """Loads the model.

        Args:
            folder: config.json, *.safetensors and the tokenizer with its chat template.
            threads: of torch's operators.

        Raises:
            ModelUnavailable: the tokenizer or its chat template is missing or broken.
        """
        torch.set_num_threads(threads)
        self.device = "cpu"
        tokenizer = _load_tokenizer(folder)
        self.model = _load_model(folder, "auto").eval()
        for module in self.model.modules():
            compute_in_float32(module)
        chat = _chat_tokenizer(folder, tokenizer, self.model.generation_config.eos_token_id)
        Decoder.__init__(self, chat, int(self.model.config.max_position_embeddings))
        self.tokenizer = chat.tokenizer


def compute_in_float32(module: Any) -> None:
    """Makes a module convert its own weights to float32 for each forward pass."""
    if isinstance(module, torch.nn.Embedding):
        # Only a few of its rows are used.
        module.register_forward_hook(lambda module, inputs, output: output.float())
    elif isinstance(module, torch.nn.Linear) and module.weight.dtype != torch.float32:
        module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]
    elif any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(_narrow, always_call=True)


def _linear(module: Any, inputs: Any) -> Any:
    """The projection, with a part of its rows in float32 at a time: a head may be large."""
    parts = module.weight.split(max(1, _PART // module.in_features))
    outputs = [torch.nn.functional.linear(inputs, rows.float()) for rows in parts]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return joined if module.bias is None else joined + module.bias.float()


def _widen(module: Any, inputs: Any) -> None:
    held = {name: each.data for name, each in module.named_parameters(recurse=False)}
    setattr(module, _HELD, held)
    for name, each in module.named_parameters(recurse=False):
        each.data = held[name].float()


def _narrow(module: Any, inputs: Any, output: Any) -> None:
    for name, stored in getattr(module, _HELD).items():
        getattr(module, name).data = stored

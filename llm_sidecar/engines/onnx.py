"""onnxruntime-genai: on CUDA, and for models that plain onnxruntime cannot run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime_genai as og

from llm_sidecar.engines.chat import ChatTokenizer, end_tokens
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.generation import Logits
from llm_sidecar.errors import AdapterRejected, ModelUnavailable

_ADAPTER: Final = "adapter"
"""The name of the loaded adapter in the runtime."""
_CAPACITY_STEP: Final = 512
"""Tokens by which capacity grows; a cached prefix keeps this many free for longer prompts."""
_LONG_ROPE: Final = {"phi3": 4096, "phimoe": 4096}
"""Number of tokens beyond which long-context Phi-3 models use other rotary embeddings, so that all
states must be computed again (`Generator::GenerateNextToken` of onnxruntime-genai)."""


def has_cuda() -> bool:
    """Whether the installed runtime finds a GPU."""
    return bool(og.is_cuda_available())


class GeneratorStates:
    """The attention states of an onnxruntime-genai generator; its sampling is not used.

    Attributes:
        capacity: maximum number of tokens.
        switch: number of tokens beyond which the rotary embeddings, and so all states, differ.
    """

    def __init__(self, generator: Any, capacity: int, switch: int) -> None:
        self.generator = generator
        self.capacity = capacity
        self.switch = switch

    @property
    def length(self) -> int:
        """The number of tokens so far."""
        return int(self.generator.token_count())

    @property
    def rewinds(self) -> bool:
        """False beyond `switch`: shorter prompts need states of the other embeddings."""
        return self.length <= self.switch

    def rewind(self, length: int) -> None:
        """See `States`."""
        self.generator.rewind_to(length)

    def append(self, tokens: Sequence[int]) -> None:
        """Processes tokens; processes all earlier ones again when the length passes `switch`."""
        length = self.length
        if length <= self.switch < length + len(tokens) and length > 0:
            tokens = [*self.generator.get_sequence(0).tolist(), *tokens]
            self.generator.rewind_to(0)
        self.generator.append_tokens(tokens)


class OnnxEngine(Decoder[GeneratorStates]):
    """A model built by `onnxruntime_genai.models.builder`."""

    runtime = "onnxruntime-genai"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        adapter: Path | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: holds genai_config.json, the model and its tokenizer.
            device: `auto` takes CUDA if the runtime has it.
            threads: of the decoder session, on CPU.
            adapter: folder with an `adapter.onnx_adapter`, as `models.lora` writes it. A model is a
                little faster without one.

        Raises:
            ModelUnavailable: `cuda` is requested, and the runtime has none.
            AdapterRejected: the adapter does not fit.
        """
        if device == "cuda" and not has_cuda():
            raise ModelUnavailable(
                "DEVICE=cuda, but the installed onnxruntime-genai has no CUDA; "
                "install onnxruntime-genai-cuda or set DEVICE=cpu"
            )
        self.device = "cuda" if device != "cpu" and has_cuda() else "cpu"
        config = og.Config(str(folder))
        if self.device == "cuda":
            config.clear_providers()
            config.append_provider("cuda")
        else:
            session = {
                "intra_op_num_threads": threads,
                "session.intra_op.allow_spinning": "0",
            }
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        written = json.loads((folder / "genai_config.json").read_bytes())["model"]
        if adapter is not None:
            # It takes 30 MB, which most workers do not need.
            from llm_sidecar.engines.lora_graph import read_adapter, read_lora_graph

            name = written["decoder"]["filename"]
            graph = read_lora_graph(folder / name)
            read_adapter(adapter, graph.projections)
            config.add_model_data(name, graph.serialized)
        self.model = og.Model(config)
        self._switch = _LONG_ROPE.get(written["type"], int(written["context_length"]))
        self._adapters: Any = None
        chat = ChatTokenizer.from_folder(folder, end_tokens(written))
        super().__init__(chat, int(written["context_length"]))
        if adapter is not None:
            self._load_adapter(adapter)

    def new_states(self, capacity: int) -> GeneratorStates:
        """See `Decoder`."""
        steps = -(-capacity // _CAPACITY_STEP) + 1
        capacity = min(self.context_length, steps * _CAPACITY_STEP)
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=capacity)
        generator = og.Generator(self.model, params)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, _ADAPTER)
        return GeneratorStates(generator, capacity, self._switch)

    def forward(self, tokens: Sequence[int], states: GeneratorStates) -> Logits:
        """See `Decoder`."""
        states.append(tokens)
        return np.asarray(states.generator.get_logits().reshape(-1), np.float32)

    def _load_adapter(self, folder: Path) -> None:
        from llm_sidecar.engines.lora_graph import ADAPTER_FILE

        self._adapters = og.Adapters(self.model)
        try:
            self._adapters.load(str(folder / ADAPTER_FILE), _ADAPTER)
            self.check_adapter()
        except AdapterRejected:
            raise
        except Exception as error:  # noqa: BLE001 - the runtime raises bare ones
            raise AdapterRejected(
                f"the model does not run with it: {type(error).__name__}"
            ) from None

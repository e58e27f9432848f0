"""Engines: the runtimes of language models, behind one Protocol.

The files of a model determine its engine. Only `load_engine` imports the runtimes.
"""

from __future__ import annotations

import os
from pathlib import Path

# Otherwise onnxruntime and onnxruntime-genai write a device id and events under ~/.cache, and send
# them. They read the variable when they load, so `disable_telemetry_events` is too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from llm_sidecar.engines.base import (
    Delta,
    Engine,
    FinishReason,
    GenerationRequest,
    Message,
)
from llm_sidecar.errors import ModelUnavailable

__all__ = ["Delta", "Engine", "FinishReason", "GenerationRequest", "Message", "load_engine"]


def load_engine(
    folder: Path,
    *,
    device: str = "auto",
    threads: int = 1,
    adapter: Path | None = None,
) -> Engine:
    """Loads the model in `folder` into this process.

    Args:
        folder: a config.json alone means torch. A genai_config.json means onnxruntime on a CPU, and
            onnxruntime-genai on CUDA and for models that onnxruntime alone cannot run here: other
            architectures than Llama, Mistral, Phi-3 and Qwen 2 and 3, Phi-3 with a long context
            (its rotary embeddings change with the length), sliding windows and pruned logits
            managed by the runtime, attention that does not update its states in place, and an
            incomplete configuration.
        device: `auto`, `cpu` or `cuda`.
        threads: of the runtime, on CPU.
        adapter: folder of a LoRA adapter in the runtime's own format.

    Raises:
        ModelUnavailable: the folder holds no model, or the device is missing.
        AdapterRejected: the adapter does not fit, or its folder lacks files.
    """
    if (folder / "genai_config.json").is_file():
        return _load_onnx(folder, device, threads, adapter)
    if (folder / "config.json").is_file():
        from llm_sidecar.engines.torch import TorchEngine

        return TorchEngine(folder, device=device, threads=threads, adapter=adapter)
    raise ModelUnavailable(
        f"{folder} holds no model: it needs a genai_config.json (onnxruntime-genai) "
        "or a config.json (transformers)"
    )


def _load_onnx(folder: Path, device: str, threads: int, adapter: Path | None) -> Engine:
    from llm_sidecar.engines.ort import OrtEngine, can_run

    if device != "cuda" and can_run(folder):
        if device == "auto":
            from llm_sidecar.engines.onnx import has_cuda

            device = "cuda" if has_cuda() else "cpu"
        if device == "cpu":
            return OrtEngine(folder, threads=threads, adapter=adapter)
    from llm_sidecar.engines.onnx import OnnxEngine

    return OnnxEngine(folder, device=device, threads=threads, adapter=adapter)

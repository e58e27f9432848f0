"""Engines: the runtimes that can hold a language model, behind one Protocol.

Which one runs a model follows from its files. The runtimes are imported by `load_engine` only.
"""

from __future__ import annotations

import os
from pathlib import Path

# Read when the library loads. Without it onnxruntime and onnxruntime-genai write a device id and
# events under ~/.cache and send them; `disable_telemetry_events` comes too late for that.
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
    guided: bool = True,
) -> Engine:
    """Loads the model in `folder` into this process.

    Args:
        folder: with a genai_config.json it runs on onnxruntime-genai, with a config.json on torch.
            On a CPU, without guidance and an adapter, most architectures of the first kind run on
            onnxruntime alone, which generates several at once.
        device: `auto`, `cpu` or `cuda`.
        threads: of the runtime, on CPU.
        adapter: folder of a LoRA adapter in the runtime's own format.
        guided: whether requests may come with guidance.

    Raises:
        ModelUnavailable: the folder holds no model, or the device is not there.
        AdapterRejected: the adapter's folder lacks what the runtime loads.
    """
    if (folder / "genai_config.json").is_file():
        from llm_sidecar.engines.onnx import OnnxEngine, has_cuda

        on_cpu = device == "cpu" or (device == "auto" and not has_cuda())
        if on_cpu and adapter is None and not guided:
            # It takes tens of megabytes, which a guided model's worker does without.
            from llm_sidecar.engines.ort import OrtEngine, runs_here

            if runs_here(folder):
                return OrtEngine(folder, threads=threads)
        return OnnxEngine(folder, device=device, threads=threads, adapter=adapter)
    if (folder / "config.json").is_file():
        from llm_sidecar.engines.torch import TorchEngine

        return TorchEngine(folder, device=device, threads=threads, adapter=adapter)
    raise ModelUnavailable(
        f"{folder} holds no model: it needs a genai_config.json (onnxruntime-genai) "
        "or a config.json (transformers)"
    )

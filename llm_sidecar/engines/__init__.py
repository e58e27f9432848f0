"""Engines: the runtimes of language models, behind one Protocol.

The files of a model determine its engine. Only `load_engine` imports the runtimes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

# Otherwise onnxruntime and onnxruntime-genai write a device id and events under ~/.cache, and send
# them. They read the variable when they load, so `disable_telemetry_events` is too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from llm_sidecar.engines.base import (
    Delta,
    Dtype,
    Engine,
    EngineOptions,
    FinishReason,
    GenerationRequest,
    Message,
    PrefillDtype,
)
from llm_sidecar.engines.sampling import read_sampling
from llm_sidecar.errors import ModelUnavailable

__all__ = [
    "Delta",
    "Dtype",
    "Engine",
    "EngineOptions",
    "FinishReason",
    "GenerationRequest",
    "Message",
    "PrefillDtype",
    "load_engine",
]


def load_engine(
    model: Path,
    *,
    device: str = "auto",
    threads: int = 1,
    adapter: Path | None = None,
    llama_server: str | None = None,
    dtype: Dtype | None = None,
    prefill_dtype: PrefillDtype = "off",
) -> Engine:
    """Loads a model into this process.

    Args:
        model: a .gguf file means llama.cpp, in a process of its own that ends with this one.
            Otherwise it is a folder. A config.json alone means torch. A genai_config.json means
            onnxruntime on a CPU, and onnxruntime-genai on CUDA and for models that onnxruntime
            alone cannot run here: other
            architectures than Llama, Mistral, Phi-3 and Qwen 2 and 3, Phi-3 with a long context
            (its rotary embeddings change with the length), sliding windows whose states the
            runtime moves, attention that does not update its states in place, and an incomplete
            configuration.
        adapter: folder of a LoRA adapter in the runtime's own format.
        device, threads, llama_server, dtype, prefill_dtype: see `EngineOptions`.

    Raises:
        ModelUnavailable: the folder holds no model that runs here, or the device is missing.
        AdapterRejected: the adapter does not fit, or its folder lacks files.
    """
    options = EngineOptions(device, threads, llama_server, dtype, prefill_dtype)
    engine = _load(model, adapter, options)
    engine.sampling = read_sampling(model if model.is_dir() else model.parent)
    return engine


def _load(model: Path, adapter: Path | None, options: EngineOptions) -> Engine:
    device, threads = options.device, options.threads
    if model.suffix == ".gguf":
        from llm_sidecar.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(
            model, device=device, threads=threads, adapter=adapter, program=options.llama_server
        )
    if (model / "genai_config.json").is_file():
        return _load_onnx(model, adapter, options)
    if (model / "config.json").is_file():
        from llm_sidecar.engines.torch import TorchEngine

        return TorchEngine(
            model, device=device, threads=threads, adapter=adapter, dtype=options.dtype
        )
    raise ModelUnavailable(
        f"{model} holds no model: it needs a genai_config.json (onnxruntime-genai) "
        "or a config.json (transformers)"
    )


def _load_onnx(folder: Path, adapter: Path | None, options: EngineOptions) -> Engine:
    from llm_sidecar.engines.handover import hand_over
    from llm_sidecar.engines.ort import OrtEngine, can_run

    _check_model_file(folder)
    device, threads = options.device, options.threads
    if device != "cuda" and can_run(folder):
        if device == "auto":
            from llm_sidecar.engines.onnx import has_cuda

            device = "cuda" if has_cuda() else "cpu"
        if device == "cpu":
            engine = OrtEngine(folder, threads=threads, adapter=adapter)
            if adapter is None:
                hand_over(engine, folder, options.prefill_dtype, threads)
            return engine
    from llm_sidecar.engines.onnx import OnnxEngine

    return OnnxEngine(folder, device=device, threads=threads, adapter=adapter)


def _check_model_file(folder: Path) -> None:
    """Raises ModelUnavailable if genai_config.json is broken or names a file that is missing."""
    try:
        written = json.loads((folder / "genai_config.json").read_bytes())
        name = written["model"]["decoder"].get("filename", "")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelUnavailable(
            f"{folder}/genai_config.json does not describe a model; copy it again from the original"
        ) from None
    if not (folder / name).exists():
        raise ModelUnavailable(
            f"{folder} lacks {name}, which its genai_config.json names; copy it there"
        )

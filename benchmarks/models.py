"""Models of about 100 million random weights, large enough that model time dominates as in life; a
server of them, and prompts and examples for them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from llm_sidecar.models.conversion import build
from llm_sidecar.proposals import Example
from tests.live_server import serve
from training.demo_models.market import draw

Architecture = Literal["phi3", "llama"]
FOLDER: Final = Path(".data/bench-models")
"""The folder in which they are kept for the next run."""
_VOCABULARY: Final = 8192
_CONTEXT: Final = 4096
THREADS: Final = 2
_RNG: Final = Random(8)


def transformers_model(architecture: Architecture) -> Path:
    """A transformers folder in float32, made on first use."""
    folder = FOLDER / f"{architecture}-torch"
    if not (folder / "config.json").is_file():
        _write(folder, architecture)
    return folder


def onnx_model(architecture: Architecture) -> Path:
    """The same model for onnxruntime-genai, in int4."""
    folder = FOLDER / f"{architecture}-int4"
    if not (folder / "genai_config.json").is_file():
        build(transformers_model(architecture), folder, "int4")
    return folder


def _write(folder: Path, architecture: Architecture) -> None:
    import torch
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )

    from llm_sidecar.proposals import dumps
    from training.demo_models.tokenizer import CHATML, PHI3, train_tokenizer

    rng = Random(0)
    cases = [draw(rng, "train") for _ in range(4000)]
    texts = [text for case in cases for text in (case.prompt, dumps(case.proposal))]
    chat = PHI3 if architecture == "phi3" else CHATML
    tokenizer = train_tokenizer(texts, chat, _VOCABULARY)
    shape: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model = (
        Phi3ForCausalLM(Phi3Config(original_max_position_embeddings=_CONTEXT, **shape))
        if architecture == "phi3"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def size(folder: Path) -> str:
    """The number of parameters of the model, in millions."""
    index = json.loads((folder / "config.json").read_bytes())
    hidden, inner = index["hidden_size"], index["intermediate_size"]
    layers = index["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)
    return f"{(layers + 2 * index['vocab_size'] * hidden) / 1e6:.0f}M"


def served(folder: Path, **environ: str) -> Any:
    """A server of the int4 models, unless `environ` names others, as a context manager."""
    folder.mkdir(exist_ok=True)
    usual = {
        "MICRO_LLM_MODEL_PATH": str((onnx_model("phi3") / "model.onnx").absolute()),
        "HERMES_MODEL_PATH": str(onnx_model("llama").absolute()),
        "PHI3_THREADS": str(THREADS),
        "HERMES_THREADS": str(THREADS),
        "PRELOAD_MODELS": "true",
    }
    return serve(folder, **(usual | environ))


def prompts(count: int) -> list[str]:
    """Prompts of about the same length that no run has seen before."""
    drawn: list[str] = []
    while len(drawn) < count:
        prompt = draw(_RNG, "train").prompt
        if 100 <= len(prompt) <= 200:
            drawn.append(prompt)
    return drawn


def examples(count: int) -> list[Example]:
    """Prompts of up to 300 characters with their right proposals."""
    cases = [draw(_RNG, "train", 300) for _ in range(count)]
    return [Example(case.prompt, case.proposal) for case in cases]

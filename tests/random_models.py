"""Models of random weights in real formats, for tests that must hold whatever the weights say."""

from __future__ import annotations

import runpy
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CONTEXT_LENGTH = 8192


def write_transformers_folder(
    folder: Path,
    *,
    architecture: str = "phi3",
    seed: int = 0,
    hidden_size: int = 64,
    head_dim: int | None = None,
    original_context_length: int = CONTEXT_LENGTH,
) -> Path:
    """A 0.3M-parameter model with random weights and a byte-level tokenizer, Phi-3 or Llama.

    Args:
        head_dim: size of an attention head; default: a fourth of `hidden_size`.
        original_context_length: of a Phi-3, which has other rotary embeddings beyond it.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        PreTrainedTokenizerFast,
    )

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ['{"ticker":"ABC","action":"adjust","side":"LONG","confidence":0.5}'] * 4
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:4],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    )
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 4,
        "initializer_range": 0.5,
    }
    if head_dim is not None:
        shape["head_dim"] = head_dim
    if architecture == "phi3":
        if original_context_length < CONTEXT_LENGTH:
            factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
            shape["rope_parameters"] = {
                "rope_type": "longrope",
                # As the builder expects it.
                "type": "longrope",
                "rope_theta": 1e4,
                **factors,
            }
        config = Phi3Config(original_max_position_embeddings=original_context_length, **shape)
        model = Phi3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        # Never the likeliest token: a greedy completion runs to its limit.
        model.lm_head.weight[4] = 0.0
    model.generation_config = GenerationConfig(eos_token_id=4, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def convert_to_onnx(
    source: Path, folder: Path, precision: str = "int4", options: Sequence[str] = ()
) -> Path:
    """Converts a transformers folder to an onnxruntime-genai one.

    It runs the builder as `conversion.build` does, but in this process: of the ten seconds that a
    process of its own takes, nine are for imports.

    Args:
        options: extra options of the builder, such as `prune_lm_head=true`.
    """
    with tempfile.TemporaryDirectory() as cache:
        arguments = ["-m", "", "-p", precision, "-e", "cpu", "-i", str(source), "-o", str(folder)]
        if options:
            arguments += ["--extra_options", *options]
        with (
            patch.object(sys, "argv", ["builder", *arguments, "-c", cache]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    return folder


def write_adapter(model: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """A PEFT LoRA adapter with random weights for the model in `model`.

    Args:
        settings: of PEFT's LoraConfig, beside or instead of rank 4 and `qkv_proj`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    usual = {"r": 4, "target_modules": ["qkv_proj"], "init_lora_weights": False}
    config = LoraConfig(task_type="CAUSAL_LM", **{**usual, **settings})
    base = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    with warnings.catch_warnings():
        # transformers' business with peft
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        get_peft_model(base, config).save_pretrained(str(folder))
    return folder


def write_onnx_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """An adapter of rank 8 with random weights for every projection of the ONNX model in `base`."""
    import numpy as np

    from llm_sidecar.engines.lora_graph import ADAPTER_FILE, read_lora_graph
    from llm_sidecar.engines.lora_graph import write_adapter as write_matrices

    numbers = np.random.default_rng(seed)
    matrices = {
        name: tuple(
            numbers.normal(0, 0.02, shape).astype(each.dtype)
            for shape in ((each.inputs, 8), (8, each.outputs))
        )
        for name, each in read_lora_graph(base / "model.onnx").projections.items()
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    write_matrices(folder / ADAPTER_FILE, matrices)
    return folder

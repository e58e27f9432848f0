"""Folders in the layouts of well-known models, with small random weights.

    folder = write_layout("phi3-june", tmp_path)

Each folder has the files, the chat template's behaviour and the configuration values of the real
one, except for its size: the vocabulary has at most 800 tokens, there are two layers of width 64,
and the query heads are cut to four with the real ratio of query heads to key heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests import layout_templates as templates
from tests.layout_tokenizers import (
    BYTES,
    BYTES3,
    GPT2,
    bytes_tokenizer,
    gemma_tokenizer,
    sentencepiece_tokenizer,
)

_THOUGHTS: Final = ("<think>", "</think>")
"""Added tokens that are not special."""
_SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
}
"""What is cut in every configuration, beside the vocabulary."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a folder is written.

    Attributes:
        architecture: transformers' model type.
        tokenizer: `sentencepiece`, `gemma`, or how a byte-level tokenizer splits text.
        template: as in tokenizer_config.json: a text, or a list of named ones.
        tokens: the added tokens, in the order of their numbers.
        eos: the token that ends a turn.
        bos: the token that begins a chat, or None.
        tokenizer_class: as in tokenizer_config.json.
        values: of config.json.
        in_file: whether the template has a chat_template.jinja of its own.
        rstrip: added tokens that take the white space behind them.
    """

    architecture: str
    tokenizer: str
    template: Any
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"
    values: dict[str, Any] = field(default_factory=dict)
    in_file: bool = False
    rstrip: tuple[str, ...] = ()


_MISTRAL: Final = {
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA_3: Final = {
    "num_key_value_heads": 1,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA_3_TOKENS: Final = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
)
_PHI3: Final = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_PHI3_TOKENS: Final = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
)
_PHI3_RSTRIP: Final = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_QWEN: Final = {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_QWEN_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

LAYOUTS: Final[dict[str, Layout]] = {
    "hermes-3": Layout(
        "llama",
        BYTES3,
        [
            {
                "name": "default",
                "template": "{{ bos_token }}" + templates.CHATML + templates.CHATML_HEADER,
            },
            {"name": "tool_use", "template": "{{ raise_exception('no tools') }}"},
        ],
        _LLAMA_3_TOKENS,
        "<|im_end|>",
        "<|begin_of_text|>",
        values=_LLAMA_3,
    ),
    "hermes-2-pro": Layout(
        "mistral",
        "sentencepiece",
        "{{ bos_token }}" + templates.CHATML + templates.CHATML_HEADER,
        ("<|im_end|>", "<|im_start|>"),
        "<|im_end|>",
        "<s>",
        "LlamaTokenizer",
        values={**_MISTRAL, "sliding_window": 4096},
    ),
    "mistral-0.2": Layout(
        "mistral",
        "sentencepiece",
        templates.MISTRAL_02,
        (),
        "</s>",
        "<s>",
        "LlamaTokenizer",
        values={**_MISTRAL, "rope_theta": 1e6, "sliding_window": None},
    ),
    "mistral-0.3": Layout(
        "mistral",
        "sentencepiece",
        templates.MISTRAL_03,
        ("[INST]", "[/INST]"),
        "</s>",
        "<s>",
        "LlamaTokenizer",
        values={**_MISTRAL, "rope_theta": 1e6, "sliding_window": None},
    ),
    "phi3-april": Layout(
        "phi3",
        "sentencepiece",
        templates.PHI3_APRIL,
        _PHI3_TOKENS,
        "<|endoftext|>",
        "<s>",
        "LlamaTokenizer",
        _PHI3,
        rstrip=_PHI3_RSTRIP,
    ),
    "phi3-june": Layout(
        "phi3",
        "sentencepiece",
        templates.PHI3_JUNE,
        _PHI3_TOKENS,
        "<|endoftext|>",
        "<s>",
        "LlamaTokenizer",
        _PHI3,
        rstrip=_PHI3_RSTRIP,
    ),
    "llama-2": Layout(
        "llama",
        "sentencepiece",
        templates.LLAMA_2,
        (),
        "</s>",
        "<s>",
        "LlamaTokenizer",
        values={
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama-3.1": Layout(
        "llama",
        BYTES3,
        templates.LLAMA_31,
        _LLAMA_3_TOKENS,
        "<|eot_id|>",
        "<|begin_of_text|>",
        values=_LLAMA_3,
        in_file=True,
    ),
    "gemma-2": Layout(
        "gemma2",
        "gemma",
        templates.GEMMA_2,
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        "GemmaTokenizer",
        values={
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "qwen-3": Layout(
        "qwen3",
        BYTES,
        templates.QWEN_3,
        _QWEN_TOKENS,
        "<|im_end|>",
        tokenizer_class="Qwen2Tokenizer",
        values=_QWEN,
    ),
    "qwen-3-thinking": Layout(
        "qwen3",
        BYTES,
        templates.QWEN_3_THINKING,
        _QWEN_TOKENS,
        "<|im_end|>",
        tokenizer_class="Qwen2Tokenizer",
        values=_QWEN,
        in_file=True,
    ),
    "r1-distill": Layout(
        "llama",
        BYTES3,
        templates.R1,
        templates.R1_TOKENS,
        templates.R1_TOKENS[1],
        templates.R1_TOKENS[0],
        tokenizer_class="LlamaTokenizerFast",
        values=_LLAMA_3,
    ),
    "no-header": Layout(
        "llama",
        BYTES3,
        templates.CHATML,
        _LLAMA_3_TOKENS,
        "<|im_end|>",
        values=_LLAMA_3,
    ),
    "vicuna": Layout(
        "llama",
        GPT2,
        templates.VICUNA,
        ("<s>", "</s>"),
        "</s>",
        "<s>",
        values=_LLAMA_3,
    ),
}
"""By name. The last two are of older fine-tunings: a template without a generation prompt, and one
that ends in a space, which becomes part of the answer's first token."""


def write_layout(name: str, folder: Path, *, weights: bool = False, seed: int = 0) -> Path:
    """Writes the tokenizer and config.json of a layout, with `weights` also the model."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(layout, _write_tokenizer(layout, folder))
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        model.save_pretrained(folder)
    return folder


def _write_tokenizer(layout: Layout, folder: Path) -> Any:
    """Writes tokenizer.json and tokenizer_config.json; returns the tokenizer."""
    backend = _backend(layout.tokenizer)
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, rstrip=token in layout.rstrip)
            for token in layout.tokens
            if token not in _THOUGHTS
        ]
    )
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token in layout.tokens if token in _THOUGHTS]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": layout.tokenizer_class,
        "eos_token": layout.eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": layout.values["max_position_embeddings"],
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in backend.get_added_tokens_decoder().items()
        },
    }
    if layout.bos is not None:
        config |= {"bos_token": layout.bos, "add_bos_token": True}
    if layout.tokenizer in ("sentencepiece", "gemma"):
        config |= {"unk_token": "<unk>"}
    if layout.tokenizer == "sentencepiece":
        config |= {"legacy": False, "add_eos_token": False}
    if layout.in_file:
        (folder / "chat_template.jinja").write_text(layout.template, encoding="utf-8")
    else:
        config["chat_template"] = layout.template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return backend


def _backend(kind: str) -> Any:
    if kind == "sentencepiece":
        return sentencepiece_tokenizer()
    return gemma_tokenizer() if kind == "gemma" else bytes_tokenizer(kind)


def _config(layout: Layout, tokenizer: Any) -> Any:
    bos = None if layout.bos is None else tokenizer.token_to_id(layout.bos)
    return AutoConfig.for_model(
        layout.architecture,
        **{**_SIZES, **layout.values},
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=bos,
        eos_token_id=tokenizer.token_to_id(layout.eos),
        pad_token_id=0,
    )

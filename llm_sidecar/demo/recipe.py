"""The recipe of both models: tokenizer, shape, training, and the files that engines load."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from llm_sidecar.demo import judgement, market
from llm_sidecar.demo.tokenizer import CHATML, CONTEXT_LENGTH, PHI3, train_tokenizer
from llm_sidecar.demo.training import Schedule, train
from llm_sidecar.engines import Message

_VOCABULARY: Final = 1024
_TOKENIZER_CHATS: Final = 4000
_PHI3: Final = Schedule(tokens=7_500_000)
_HERMES: Final = Schedule(tokens=4_000_000)


def train_phi3(folder: Path, *, seed: int, threads: int, scale: float = 1.0) -> None:
    """Trains the proposal model and writes it for onnxruntime-genai, in int4.

    Args:
        folder: replaced as a whole, once all went well.
        seed: of weights and data.
        threads: of torch.
        scale: part of the usual number of tokens.
    """
    _prepare(seed, threads)
    tokenizer = train_tokenizer(_texts(market.chats(seed + 1000)), PHI3, _VOCABULARY)
    config = Phi3Config(
        hidden_size=192,
        # Not half the vocabulary: the builder takes a matrix of the head's shape for the head.
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        original_max_position_embeddings=CONTEXT_LENGTH,
        **_common(tokenizer),
    )
    model = Phi3ForCausalLM(config)
    train(model, tokenizer, market.chats(seed), _scaled(_PHI3, scale), "phi3")
    with tempfile.TemporaryDirectory() as temporary:
        source, built = Path(temporary, "transformers"), Path(temporary, "built")
        _save(model, tokenizer, source)
        _build(source, built)
        _replace(built, folder)


def train_hermes(folder: Path, *, seed: int, threads: int, scale: float = 1.0) -> None:
    """Trains the critique and score model and writes it for transformers, in bfloat16.

    Args: as of `train_phi3`.
    """
    _prepare(seed, threads)
    tokenizer = train_tokenizer(_texts(judgement.chats(seed + 1000)), CHATML, _VOCABULARY)
    config = LlamaConfig(
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        **_common(tokenizer),
    )
    model = LlamaForCausalLM(config)
    train(model, tokenizer, judgement.chats(seed), _scaled(_HERMES, scale), "hermes")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "transformers")
        _save(model.to(torch.bfloat16), tokenizer, source)
        _replace(source, folder)


def _prepare(seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


def _texts(chats: Iterable[Sequence[Message]]) -> Iterable[str]:
    for chat in itertools.islice(chats, _TOKENIZER_CHATS):
        yield from (message["content"] for message in chat)


def _common(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _scaled(schedule: Schedule, scale: float) -> Schedule:
    return replace(schedule, tokens=int(schedule.tokens * scale))


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build(source: Path, folder: Path) -> None:
    """Converts with the runtime's own builder; what it prints is shown where it fails."""
    cache = folder.with_name("cache")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "", "-p", "int4"]
    command += ["-e", "cpu", "-i", str(source), "-o", str(folder), "-c", str(cache)]
    environ = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"the model builder failed: {done.stderr[-2000:]}")


def _replace(source: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)

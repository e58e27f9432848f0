"""The recipe of both models: tokenizer, shape, training, and the files that engines load."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from llm_sidecar.models.conversion import build
from training.demo_models import judgement, proposal_lessons
from training.demo_models.autograd_functions import rounded
from training.demo_models.lessons import Teacher
from training.demo_models.schedule import Schedule
from training.demo_models.tickers import ACRONYMS, INDEXES, KEYWORDS
from training.demo_models.tokenizer import CHATML, CONTEXT_LENGTH, NUMBERS, PHI3, train_tokenizer
from training.demo_models.trainer import prepare_attention, train

_VOCABULARY: Final = 2816
_NUMBERS_VOCABULARY: Final = 1536
_TOKENIZER_LESSONS: Final = 4000
PROCESSES: Final = 2
"""That train a model together: part of the recipe, as each draws lessons of its own."""
_PHI3: Final = Schedule(
    tokens=10_500_000,
    batch_tokens=1280,
    growth=4.0,
    least_rate=0.4,
    again=0.3,
    rounded=0.2,
    language=0.1,
)
_REVISION: Final = Schedule(
    tokens=5_000_000,
    batch_tokens=1920,
    growth=1.0,
    # Those that the first round ends with.
    matrix_rate=_PHI3.least_rate * _PHI3.matrix_rate,
    other_rate=_PHI3.least_rate * _PHI3.other_rate,
    rounded=1.0,
    mined=0.5,
)
_HERMES: Final = Schedule(tokens=3_500_000, batch_tokens=2560, growth=2.0)


class Member(NamedTuple):
    """One of the processes that train a model together.

    Attributes:
        rank: its number, from 0; that one writes the model.
        size: how many there are.
        meeting: a file, not there yet, by which they find each other.
    """

    rank: int
    size: int
    meeting: Path


def train_phi3(folder: Path, member: Member, *, seed: int, scale: float = 1.0) -> None:
    """Trains the proposal model and writes it for onnxruntime-genai, in int4.

    Args:
        folder: replaced as a whole, once all went well.
        member: this process among those that train together.
        seed: of weights and data.
        scale: part of the usual number of tokens.
    """
    prepare(seed, member)
    tokenizer = train_tokenizer(
        _texts(proposal_lessons.teacher(seed + 1000)),
        PHI3,
        _VOCABULARY,
        whole=(*ACRONYMS, *INDEXES, *KEYWORDS),
    )
    config = Phi3Config(
        hidden_size=256,
        # Not half the vocabulary: the builder takes a matrix of the head's shape for the head.
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        original_max_position_embeddings=CONTEXT_LENGTH,
        **_common(tokenizer),
    )
    model = Phi3ForCausalLM(config)
    prepare_attention(model)
    train(
        model,
        tokenizer,
        proposal_lessons.teacher(seed + member.rank),
        _scaled(_PHI3, scale),
        "phi3",
    )
    revise(model, tokenizer, seed + 100 + member.rank, scale)
    if member.rank > 0:
        return
    with tempfile.TemporaryDirectory() as temporary:
        source, built = Path(temporary, "transformers"), Path(temporary, "built")
        _save(model, tokenizer, source)
        build(source, built, "int4")
        _replace(built, folder)


def revise(model: Any, tokenizer: Any, seed: int, scale: float) -> None:
    """Trains a Phi-3 that has learned once more, from the weights that int4 would keep of it.

    The rate falls on from where it was, and half of the lessons are those that it is worst at.

    Args:
        seed: of the lessons; another one for each process.
        scale: part of the usual number of tokens.
    """
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.ndim == 2:
                matrix.copy_(rounded(matrix))
    train(
        model,
        tokenizer,
        proposal_lessons.revision(seed),
        _scaled(_REVISION, scale),
        "phi3, again",
        hard=proposal_lessons.candidates(seed + 50),
    )


def train_hermes(folder: Path, member: Member, *, seed: int, scale: float = 1.0) -> None:
    """Trains the critique and score model and writes it for transformers, in bfloat16.

    Args: as of `train_phi3`.
    """
    prepare(seed, member)
    # Every percentage often enough to become a token of its own.
    numbers = ["10", *(f"{tenths / 10}" for tenths in range(500))] * (_TOKENIZER_LESSONS // 4)
    texts = itertools.chain(numbers, _texts(judgement.teacher(seed + 1000)))
    tokenizer = train_tokenizer(texts, CHATML, _NUMBERS_VOCABULARY, apart=NUMBERS)
    config = LlamaConfig(
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        **_common(tokenizer),
    )
    model = LlamaForCausalLM(config)
    prepare_attention(model)
    teacher = judgement.teacher(seed + member.rank)
    train(model, tokenizer, teacher, _scaled(_HERMES, scale), "hermes")
    if member.rank > 0:
        return
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "transformers")
        _save(model.to(torch.bfloat16), tokenizer, source)
        _replace(source, folder)


def prepare(seed: int, member: Member) -> None:
    """Makes this process one of those that train a model together."""
    torch.manual_seed(seed)
    # So small a model gains less from a second thread than from a second process.
    torch.set_num_threads(1)
    if member.size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(
            "gloo",
            init_method=member.meeting.absolute().as_uri(),
            rank=member.rank,
            world_size=member.size,
        )


def _texts(teacher: Teacher) -> Iterable[str]:
    for _ in range(_TOKENIZER_LESSONS):
        yield from (message["content"] for message in teacher(1.0).messages)


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


def _replace(source: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)

"""The recipe of both models: tokenizer, architecture, training, and the resulting files."""

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
from llm_sidecar.models.prompts import PROMPTS_FILE
from training.demo_models import judgement, proposal_lessons
from training.demo_models.autograd_functions import int4_rounded
from training.demo_models.lessons import LessonSource
from training.demo_models.schedule import Schedule
from training.demo_models.tickers import ACRONYMS, INDEXES, KEYWORDS
from training.demo_models.tokenizer import CHATML, CONTEXT_LENGTH, NUMBERS, PHI3, train_tokenizer
from training.demo_models.trainer import init_attention, train

_VOCABULARY: Final = 2816
_NUMBERS_VOCABULARY: Final = 1536
_TOKENIZER_LESSONS: Final = 4000
_FIRST_ROUND: Final = Schedule(
    tokens=10_500_000,
    batch_tokens=1280,
    growth=4.0,
    least_rate=0.4,
    repeated=0.3,
    int4=0.2,
    prompt_loss=0.1,
)
_SECOND_ROUND: Final = Schedule(
    tokens=5_000_000,
    batch_tokens=1920,
    growth=1.0,
    # The first round ends with these rates.
    matrix_rate=_FIRST_ROUND.least_rate * _FIRST_ROUND.matrix_rate,
    other_rate=_FIRST_ROUND.least_rate * _FIRST_ROUND.other_rate,
    int4=1.0,
    hard=0.5,
)
_HERMES: Final = Schedule(tokens=3_500_000, batch_tokens=2560, growth=2.0)


class Member(NamedTuple):
    """One process of the group that trains a model.

    Attributes:
        rank: its index, from 0; process 0 writes the model.
        world_size: number of processes.
        rendezvous: path of a file that does not exist yet, by which torch.distributed connects
            them.
    """

    rank: int
    world_size: int
    rendezvous: Path


def train_phi3(folder: Path, member: Member, *, seed: int, scale: float = 1.0) -> None:
    """Trains the proposal model and writes it for onnxruntime-genai, in int4.

    Args:
        folder: replaced as a whole, once the training succeeded.
        member: this process.
        seed: of weights and data.
        scale: fraction of the recipe's tokens to train on.
    """
    join_group(seed, member)
    tokenizer = train_tokenizer(
        _texts(proposal_lessons.curriculum(seed + 1000)),
        PHI3,
        _VOCABULARY,
        whole=(*ACRONYMS, *INDEXES, *KEYWORDS),
    )
    config = Phi3Config(
        hidden_size=256,
        # Not half the vocabulary: the model builder would mistake the matrix for the output head.
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        original_max_position_embeddings=CONTEXT_LENGTH,
        **_common(tokenizer),
    )
    model = Phi3ForCausalLM(config)
    init_attention(model)
    train(
        model,
        tokenizer,
        proposal_lessons.curriculum(seed + member.rank),
        _scaled(_FIRST_ROUND, scale),
        "phi3",
    )
    train_second_round(model, tokenizer, seed + 100 + member.rank, scale)
    if member.rank > 0:
        return
    with tempfile.TemporaryDirectory() as temporary:
        source, built = Path(temporary, "transformers"), Path(temporary, "built")
        _save(model, tokenizer, source)
        build(source, built, "int4")
        _replace(built, folder)


def train_second_round(model: Any, tokenizer: Any, seed: int, scale: float) -> None:
    """Trains a Phi-3 further, from its weights rounded to int4.

    The learning rate continues from the end of the first round. Half of the lessons are those with
    the greatest losses.

    Args:
        model: result of the first round; trained in place.
        tokenizer: its tokenizer.
        seed: of the lessons; a different one in each process.
        scale: fraction of the recipe's tokens to train on.
    """
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.ndim == 2:
                matrix.copy_(int4_rounded(matrix))
    train(
        model,
        tokenizer,
        proposal_lessons.second_round(seed),
        _scaled(_SECOND_ROUND, scale),
        "phi3, second round",
        hard=proposal_lessons.candidates(seed + 50),
    )


def train_hermes(folder: Path, member: Member, *, seed: int, scale: float = 1.0) -> None:
    """Trains the critique and score model and writes it for transformers, in bfloat16.

    The arguments are those of `train_phi3`.
    """
    join_group(seed, member)
    # Each percentage is frequent enough to become one token.
    numbers = ["10", *(f"{tenths / 10}" for tenths in range(500))] * (_TOKENIZER_LESSONS // 4)
    texts = itertools.chain(numbers, _texts(judgement.curriculum(seed + 1000)))
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
    init_attention(model)
    source = judgement.curriculum(seed + member.rank)
    train(model, tokenizer, source, _scaled(_HERMES, scale), "hermes")
    if member.rank > 0:
        return
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary, "transformers")
        _save(model.to(torch.bfloat16), tokenizer, written)
        (written / PROMPTS_FILE).write_text(judgement.PROMPTS.model_dump_json(indent=2) + "\n")
        _replace(written, folder)


def join_group(seed: int, member: Member) -> None:
    """Seeds torch and joins the torch.distributed group of the processes that train a model."""
    torch.manual_seed(seed)
    # A model this small gains more from a second process than from a second thread.
    torch.set_num_threads(1)
    if member.world_size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(
            "gloo",
            init_method=member.rendezvous.absolute().as_uri(),
            rank=member.rank,
            world_size=member.world_size,
        )


def _texts(source: LessonSource) -> Iterable[str]:
    for _ in range(_TOKENIZER_LESSONS):
        yield from (message["content"] for message in source(1.0).messages)


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
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _replace(source: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)

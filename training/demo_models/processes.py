"""The processes that train one model together."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

_PROCESSES: Final = 2
"""Each draws its own lessons, so more would change the weights."""


def train(name: str, out: Path, seed: int, scale: float) -> int:
    """Trains a model; returns the first exit status that is not 0.

    Args:
        name: `phi3` or `hermes`.
        out: its folder; replaced as a whole, once the training succeeded.
        seed: of weights and data.
        scale: fraction of the recipe's tokens to train on.
    """
    # Compiling a matrix product for a new shape is slow, so torch and oneDNN cache all shapes.
    os.environ.update(LRU_CACHE_CAPACITY="2048", ONEDNN_PRIMITIVE_CACHE_CAPACITY="2048")
    # glibc keeps freed memory: zeroing new pages in the kernel took up to a quarter of the time.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        running = [
            spawn.Process(
                target=_train_model,
                args=(name, out, rank, Path(folder, "rendezvous"), seed, scale),
                daemon=True,
            )
            for rank in range(_PROCESSES)
        ]
        # A normal exit ends the daemon processes too; SIGTERM alone would leave them running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for process in running:
            process.start()
        while running:
            multiprocessing.connection.wait([process.sentinel for process in running])
            if failed := [process.exitcode for process in running if process.exitcode]:
                # The others would wait for it for ever.
                for process in running:
                    process.terminate()
                return abs(failed[0])
            running = [process for process in running if process.exitcode is None]
    return 0


def _train_model(
    name: str, out: Path, rank: int, rendezvous: Path, seed: int, scale: float
) -> None:
    # Only the processes that train import torch, which takes seconds.
    from training.demo_models import recipe

    member = recipe.Member(rank, _PROCESSES, rendezvous)
    training = recipe.train_phi3 if name == "phi3" else recipe.train_hermes
    training(out, member, seed=seed, scale=scale)

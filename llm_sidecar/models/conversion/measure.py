"""Measures one model, in a process of its own.

    python -m llm_sidecar.models.conversion.measure FOLDER RESULT THREADS

writes a `Measurement` to the file RESULT as JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from llm_sidecar import command_line
from llm_sidecar.engines import GenerationRequest, load_engine
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.models.conversion.all_logits import all_logits
from llm_sidecar.models.conversion.errors import ConversionFailed
from llm_sidecar.models.conversion.passages import passages
from llm_sidecar.models.conversion.quality import Measurement
from llm_sidecar.models.conversion.sample_chats import SAMPLE_CHATS, SCORE_ANSWERS, SCORE_CHATS

_ROWS: Final = 8
"""Positions whose probabilities are computed in float64 at a time."""


def measure_engine(engine: Decoder[Any], report: Callable[[str], None]) -> Measurement:
    """Measures a loaded model; the logits of all positions must be among its outputs."""
    digest = hashlib.sha256()
    for chat in (*SAMPLE_CHATS, *SCORE_CHATS):
        digest.update(f"{engine.tokenize(GenerationRequest(chat, 1))}\n".encode())
    losses: list[float] = []
    greedy: list[int] = []
    texts = passages()
    for number, passage in enumerate(texts, start=1):
        report(f"Reading passage {number} of {len(texts)}")
        tokens = engine.tokenizer.encode(passage).ids
        digest.update(f"{tokens}\n".encode())
        for loss, best in _predictions(engine, tokens):
            losses.append(loss)
            greedy.append(best)
    scores = []
    for number, chat in enumerate(SCORE_CHATS, start=1):
        report(f"Scoring proposal {number} of {len(SCORE_CHATS)}")
        scores.append(_score(engine.score_choices(chat, SCORE_ANSWERS)))
    mean = math.fsum(losses) / len(losses)
    return Measurement(digest.hexdigest(), len(losses), float(np.exp(mean)), greedy, scores)


def _predictions(engine: Decoder[Any], tokens: Sequence[int]) -> Iterator[tuple[float, int]]:
    """The negative log-likelihood of each token but the first, and the likeliest one there."""
    logits = all_logits(engine, tokens[:-1])
    for row in range(0, len(logits), _ROWS):
        wide = logits[row : row + _ROWS].astype(np.float64)
        following = tokens[row + 1 : row + 1 + len(wide)]
        best = wide.max(axis=1)
        sums = best + np.log(np.exp(wide - best[:, None]).sum(axis=1))
        losses = sums - wide[np.arange(len(wide)), following]
        yield from zip(losses.tolist(), wide.argmax(axis=1).tolist(), strict=True)


def _score(probabilities: dict[str, float]) -> float:
    """The mean of the answers, weighted by their probabilities; 0 if they have none."""
    total = math.fsum(probabilities.values())
    if not total > 0.0:
        return 0.0
    return math.fsum(int(answer) * each for answer, each in probabilities.items()) / total


def _load(folder: Path, threads: int) -> Decoder[Any]:
    if (folder / "genai_config.json").is_file():
        engine = load_engine(folder, device="cpu", threads=threads)
        assert isinstance(engine, Decoder)
        return engine
    from llm_sidecar.models.conversion.source_engine import SourceEngine

    return SourceEngine(folder, threads)


def _main(folder: str, result: str, threads: str) -> None:
    engine = _load(Path(folder), int(threads))
    measurement = measure_engine(engine, command_line.say)
    if not math.isfinite(measurement.perplexity):
        raise ConversionFailed("the model's probabilities are not numbers")
    Path(result).write_text(json.dumps(dataclasses.asdict(measurement)))


if __name__ == "__main__":
    sys.exit(command_line.run(lambda: _main(*sys.argv[1:])))

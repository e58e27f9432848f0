"""Converts a transformers folder to ONNX, which is several times faster on a CPU.

    python -m llm_sidecar.loader convert SOURCE OUT --precision int4

onnxruntime-genai's builder converts the model; the result is kept only if it agrees with the
original.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from llm_sidecar.engines import load_engine
from llm_sidecar.errors import CommandFailed
from llm_sidecar.models.sample_chats import SAMPLE_CHATS

Precision = Literal["int4", "int8", "fp32"]

MAX_DISTANCE: Final[dict[Precision, float]] = {"int4": 0.3, "int8": 0.1, "fp32": 0.01}
"""Maximum mean distance of two models that agree; that of unrelated models is about 1."""
_STEP: Final = re.compile(r"^(Reading .*|Saving (?:ONNX model|GenAI config|processing files)) ?")


class ConversionFailed(CommandFailed):
    """The model cannot be converted, or the converted one does not agree with it."""


class Agreement(NamedTuple):
    """The distance between two models on each of a few prompts.

    Attributes:
        distances: total variation distance between their next-token distributions, from 0 (equal)
            to 1.
    """

    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean distance."""
        return sum(self.distances) / len(self.distances)


def convert(
    source: Path,
    out: Path,
    precision: Precision,
    report: Callable[[str], None] = lambda line: None,
) -> Agreement:
    """Converts the model in `source` and checks it; `out` appears only if both succeed.

    Args:
        source: config.json, *.safetensors and the tokenizer with its chat template.
        out: a folder that does not exist yet.
        precision: of the weights.
        report: called with one line of progress for each step.

    Raises:
        ConversionFailed: the model cannot be converted, or the result does not agree with it.
        ModelUnavailable: `source` holds no model that an engine loads.
    """
    if not (source / "config.json").is_file():
        raise ConversionFailed(f"{source} holds no config.json; name a transformers folder")
    if not any(source.glob("*.safetensors")):
        raise ConversionFailed(f"{source} holds no *.safetensors; other formats can run code")
    if out.exists():
        raise ConversionFailed(f"{out} already exists; name another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        built = Path(folder, "model")
        build(source, built, precision, report)
        report("Comparing with the original")
        agreement = compare(source, built)
        if not agreement.mean <= MAX_DISTANCE[precision]:
            raise ConversionFailed(
                f"the next-token probabilities of the converted model and of {source} are "
                f"{agreement.mean:.2f} apart on average, and at most "
                f"{MAX_DISTANCE[precision]} is accepted for {precision}; try a higher precision"
            )
        built.rename(out)
    return agreement


def build(
    source: Path,
    out: Path,
    precision: Precision,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs the runtime's builder, which trusts no remote code.

    Args: as in `convert`, but `out` may exist.

    Raises:
        ConversionFailed: with the last line of the builder's output.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", ""]
        command += ["-p", precision, "-e", "cpu", "-i", str(source), "-o", str(out), "-c", cache]
        environ = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
        last_line = ""
        with subprocess.Popen(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    last_line = line.strip() or last_line
                    if step := _STEP.match(line):
                        report(step[1])
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        # The last line of a traceback says what is wrong.
        raise ConversionFailed(f"the model builder failed: {last_line or 'without any output'}")


def compare(first: Path, second: Path, adapter: Path | None = None) -> Agreement:
    """The distance between the models in two folders, on the sample chats.

    Args:
        first, second: folders of models.
        adapter: folder of an adapter for the second model, or None.

    Raises:
        ConversionFailed: their tokens of the chats differ.
        AdapterRejected: the second model does not run with the adapter.
    """
    # One after the other, since both may not fit into memory.
    tokens, expected = _next_tokens(first)
    others, found = _next_tokens(second, adapter)
    if tokens != others:
        raise ConversionFailed("the converted tokenizer splits text differently than the original")
    apart = [
        float(np.abs(one - other).sum() / 2.0) for one, other in zip(expected, found, strict=True)
    ]
    return Agreement(tuple(apart))


def _next_tokens(
    folder: Path, adapter: Path | None = None
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Each chat's tokens, and the probabilities of each token to come next."""
    engine = load_engine(folder, device="cpu", threads=os.cpu_count() or 1, adapter=adapter)
    pairs = [engine.next_token(chat) for chat in SAMPLE_CHATS]
    return [tokens for tokens, _ in pairs], [probabilities for _, probabilities in pairs]

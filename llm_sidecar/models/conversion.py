"""A transformers folder as one for onnxruntime-genai, which runs several times faster on a CPU.

    python -m llm_sidecar.loader convert SOURCE OUT --precision int4

The runtime's own builder converts; what comes out is kept only if it agrees with the original.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Message, load_engine
from llm_sidecar.errors import CommandFailed

Precision = Literal["int4", "int8", "fp32"]

MOST_APART: Final[dict[Precision, float]] = {"int4": 0.3, "int8": 0.1, "fp32": 0.01}
"""Greatest mean distance at which two models agree; models that have nothing to do with each other
are about 1 apart."""
_STEP: Final = re.compile(r"^(Reading .*|Saving (?:ONNX model|GenAI config|processing files)) ?")
_PROPOSAL: Final = {
    "ticker": "AAPL",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.5,
    "new_target_pct": 6.0,
    "confidence": 0.7,
    "rationale": "RSI of 78 is overbought, so tighten the stop.",
}
_CONTEXT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run."


class ConversionFailed(CommandFailed):
    """The model cannot be converted, or what came out does not agree with it."""


class Agreement(NamedTuple):
    """How far two models are apart, on each of a few prompts.

    Attributes:
        distances: total variation distance of their next tokens, from 0 (the same) to 1.
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
    """Converts the model in `source` and checks it; `out` is there as a whole or not at all.

    Args:
        source: config.json, *.safetensors and the tokenizer with its chat template.
        out: a folder that is not there yet.
        precision: of the weights.
        report: is told of every step, in a line.

    Raises:
        ConversionFailed: says why.
        ModelUnavailable: `source` holds no model that an engine loads.
    """
    if not (source / "config.json").is_file():
        raise ConversionFailed(f"{source} holds no config.json; name a transformers folder")
    if not any(source.glob("*.safetensors")):
        raise ConversionFailed(f"{source} holds no *.safetensors; other formats can run code")
    if out.exists():
        raise ConversionFailed(f"{out} is there already; name another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        built = Path(folder, "model")
        build(source, built, precision, report)
        report("Comparing with the original")
        agreement = compare(source, built)
        if not agreement.mean <= MOST_APART[precision]:
            raise ConversionFailed(
                f"the converted model answers otherwise than {source}: their next tokens are "
                f"{agreement.mean:.2f} apart, and {MOST_APART[precision]} is the most for "
                f"{precision}; try a higher precision"
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

    Args: as of `convert`, but `out` may be there.

    Raises:
        ConversionFailed: with the last line that it said.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", ""]
        command += ["-p", precision, "-e", "cpu", "-i", str(source), "-o", str(out), "-c", cache]
        environ = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
        said = ""
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
                    said = line.strip() or said
                    if step := _STEP.match(line):
                        report(step[1])
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        # The last line of a traceback says what is wrong, the others where in somebody else's code.
        raise ConversionFailed(f"the model builder failed: {said or 'it said nothing'}")


def compare(first: Path, second: Path, adapter: Path | None = None) -> Agreement:
    """How far the models in two folders are apart on a few of the sidecar's own prompts.

    Args:
        first, second: folders of models.
        adapter: folder of one that the second is loaded with.

    Raises:
        ConversionFailed: they do not read the prompts as the same tokens.
        AdapterRejected: the second does not run with the adapter.
    """
    chats = _chats()
    # One after the other: both at once may be more than the machine holds.
    tokens, expected = _answers(first, chats)
    others, found = _answers(second, chats, adapter)
    if tokens != others:
        raise ConversionFailed("the converted tokenizer splits text otherwise than the original")
    apart = [
        float(np.abs(one - other).sum() / 2.0) for one, other in zip(expected, found, strict=True)
    ]
    return Agreement(tuple(apart))


def _answers(
    folder: Path, chats: Sequence[Sequence[Message]], adapter: Path | None = None
) -> tuple[list[list[int]], list[np.ndarray]]:
    """The prompts' tokens, and the probabilities of each token to come next."""
    engine = load_engine(folder, device="cpu", threads=os.cpu_count() or 1, adapter=adapter)
    read = [engine.next_token(chat) for chat in chats]
    return [tokens for tokens, _ in read], [probabilities for _, probabilities in read]


def _chats() -> list[list[Message]]:
    example = proposals.Example(_CONTEXT, _PROPOSAL)
    return [
        hermes_plugin.chat_messages("What does a trailing stop do?"),
        hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, _PROPOSAL, _CONTEXT),
        hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, _PROPOSAL, _CONTEXT),
        hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, {**_PROPOSAL, "new_stop_pct": 20}),
        proposals.build_messages(_CONTEXT),
        proposals.build_messages("Short TSLA, lost support at 212, ATR 4.1%.", [example]),
    ]

"""onnxruntime-genai's builder, which writes a transformers model as an ONNX graph."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

from llm_sidecar.models.conversion import child

Precision = Literal["int4", "int8", "fp32"]

_STEP: Final = re.compile(r"^(Reading .*|Saving (?:ONNX model|GenAI config|processing files)) ?")


def build(
    source: Path,
    out: Path,
    precision: Precision,
    report: Callable[[str], None] = lambda line: None,
    options: Mapping[str, str] | None = None,
) -> int:
    """Runs the builder in a process of its own.

    Args:
        source: config.json, *.safetensors and the tokenizer with its chat template.
        out: the new folder; it may exist.
        precision: of the weights.
        report: called with one line of progress for each step.
        options: the builder's `--extra_options`.

    Returns:
        The most memory that it took, in bytes.

    Raises:
        ConversionFailed: with the last line of the builder's output.
    """

    def on_line(line: str) -> None:
        if step := _STEP.match(line):
            report(step[1])

    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        arguments = ["onnxruntime_genai.models.builder", "-m", "", "-p", precision, "-e", "cpu"]
        arguments += ["-i", str(source), "-o", str(out), "-c", cache]
        if options:
            arguments += [
                "--extra_options",
                *(f"{name}={value}" for name, value in options.items()),
            ]
        return child.run("the model builder", arguments, on_line)

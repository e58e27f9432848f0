"""SmolLM2-135M-Instruct as the benchmarks need it, made on first use and kept in `.data/`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from benchmarks import models, table
from tests.real_weights import smollm2_gguf

_RECORD: Final = "conversion.json"
"""The file in which `convert` says what it kept."""
_PACKAGES: Final = ("onnxruntime", "torch", "transformers", "xllamacpp")


def gguf() -> Path:
    """The publisher's weights in 4 bits, for llama.cpp."""
    return smollm2_gguf()


def transformers_folder() -> Path:
    """The same weights in bfloat16."""
    folder = models.FOLDER / "smollm2-torch"
    if not (folder / "config.json").is_file():
        # In a process of its own, because it takes memory.
        _run("-c", _DEQUANTIZE, str(gguf().absolute()), str(folder))
    return folder


def int8() -> Path:
    """What `convert --precision int8` makes of them."""
    return _converted("int8")


def kept() -> Path:
    """What `convert --precision int4` keeps."""
    return _converted("int4")


def kept_precision() -> str:
    """`int4` or `int8`: the precision of `kept`."""
    return kept_name().partition(" ")[0].partition(",")[0]


def kept_name() -> str:
    """What `kept` is, in the words of `convert`."""
    record = kept() / _RECORD
    return str(json.loads(record.read_bytes())["kept"]) if record.is_file() else "int4"


def described() -> str:
    """The date, the machine, the packages and the models of a run."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {table.processor()}, {packages}. "
        f"SmolLM2-135M-Instruct; llama.cpp has it in Q4_1, `convert` keeps {kept_name()}. "
        "Medians; memory is resident memory."
    )


_DEQUANTIZE: Final = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, folder = Path(sys.argv[1]), sys.argv[2]
named = {"gguf_file": source.name, "local_files_only": True}
AutoTokenizer.from_pretrained(source.parent, **named).save_pretrained(folder)
AutoModelForCausalLM.from_pretrained(
    source.parent,
    quantization_config=GgufConfig(dequantize=True),
    dtype=torch.bfloat16,
    **named,
).save_pretrained(folder)
"""


def _converted(precision: str) -> Path:
    folder = models.FOLDER / f"smollm2-{precision}"
    if not (folder / "genai_config.json").is_file():
        source = str(transformers_folder())
        command = ("convert", source, str(folder), "--precision", precision)
        _run("-m", "llm_sidecar.loader", *command)
    return folder


def _run(*arguments: str) -> None:
    command: Sequence[str] = (sys.executable, *arguments)
    subprocess.run(command, check=True)

"""Fingerprints of the files that a runtime loads.

A fingerprint is a SHA-256 over the name, the size and the content of each file, in the order of the
names. Of a file above 64 MiB it takes 64 evenly spaced blocks of 1 MiB instead of the whole
content, including the first and the last. So a model of any size takes a fraction of a second.
Other weights differ everywhere, so they have another fingerprint. The fingerprint may miss a change
of a few bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from llm_sidecar.engines.gguf_model import model_files
from llm_sidecar.engines.sampling import SAMPLING_FILE
from llm_sidecar.models.folders import GGUF

_BLOCK: Final = 1 << 20
_BLOCKS: Final = 64
_ONNX: Final = (SAMPLING_FILE, "genai_config.json", "*.onnx", "*.onnx.data", "*.onnx_data")
_TRANSFORMERS: Final = (
    "config.json",
    SAMPLING_FILE,
    "*.safetensors",
    "*.safetensors.index.json",
)
_TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_ADAPTER: Final = (
    "adapter_config.json",
    "adapter.onnx_adapter",
    "adapter_model.safetensors",
    "*.gguf",
)


class Fingerprints(NamedTuple):
    """The fingerprints of a model, of its adapter if it has one, and of its tokenizer."""

    model: str
    adapter: str | None
    tokenizer: str


def fingerprints_of(model: Path, adapter: Path | None) -> Fingerprints:
    """The fingerprints of the files that `engines.load_engine` loads.

    A .gguf file holds its tokenizer too, so both have the same one.

    Raises:
        ModelUnavailable: a part of a split model is missing.
        OSError: a file cannot be read.
    """
    of_adapter = None if adapter is None else fingerprint(_files(adapter, _ADAPTER))
    if model.suffix == GGUF:
        of_model = fingerprint([*model_files(model), *_files(model.parent, (SAMPLING_FILE,))])
        return Fingerprints(of_model, of_adapter, of_model)
    patterns = _ONNX if (model / "genai_config.json").is_file() else _TRANSFORMERS
    return Fingerprints(
        fingerprint(_files(model, patterns)), of_adapter, fingerprint(_files(model, _TOKENIZER))
    )


def fingerprint_of_transformers(folder: Path) -> str:
    """The fingerprint of a model in transformers' format.

    Raises:
        OSError: a file cannot be read.
    """
    return fingerprint(_files(folder, _TRANSFORMERS))


def fingerprint(files: Iterable[Path]) -> str:
    """The fingerprint of some files, in hexadecimal digits.

    Raises:
        OSError: one of them cannot be read.
    """
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size, content = path.stat().st_size, hashlib.sha256()
        for block in _blocks(path, size):
            content.update(block)
        # A digest for each file, so that bytes cannot move from one file to the next.
        whole.update(f"{path.name}\n{size}\n{content.hexdigest()}\n".encode())
    return whole.hexdigest()


def _files(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """The content of a file that counts: all of it, or 64 blocks of a large file."""
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            while block := file.read(_BLOCK):
                yield block
            return
        for number in range(_BLOCKS):
            file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            yield file.read(_BLOCK)

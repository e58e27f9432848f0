"""Finds the model that a configured path means, in folders as publishers offer them.

A publisher's repository may hold several models, each in a folder of its own, one or two levels
down. The model file may have any name: the genai_config.json beside it says which.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

GGUF: Final = ".gguf"
_LATER_PART: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
"""A part of a split model that is not its first one."""
GENAI_CONFIG: Final = "genai_config.json"
_CONFIG: Final = "config.json"
_LEVELS: Final = 2
_MAX_FOLDERS: Final = 200
"""Subfolders that are looked into, so that a wrong path never means a search of the whole disk."""


def model_folders(path: Path) -> list[Path]:
    """The folders that `path` may mean: one if it is certain, several if it could be any of them.

    Args:
        path: of a model file or a folder. The file may be missing if a genai_config.json is beside
            it.

    Raises:
        OSError: a folder cannot be read.
    """
    if not path.is_dir():
        named = path.is_file() or (path.suffix == ".onnx" and _has(path.parent, GENAI_CONFIG))
        return [path.parent] if named and _holds_model(path.parent) else []
    if _is_model(path):
        return [path]
    below = itertools.islice(_subfolders(path, _LEVELS), _MAX_FOLDERS)
    return [folder for folder in below if _is_model(folder)] or [path] * _has(path, _CONFIG)


def gguf_files(path: Path) -> list[Path]:
    """The .gguf files that `path` may mean: itself, or those in a folder.

    Raises:
        OSError: the folder cannot be read.
    """
    if not path.is_dir():
        return [path] if path.suffix == GGUF and path.is_file() else []
    return sorted(
        file
        for file in path.glob(f"*{GGUF}")
        if file.is_file() and _LATER_PART.search(file.name) is None
    )


def onnx_file(folder: Path) -> Path | None:
    """The model file that a folder's genai_config.json names; None without one."""
    try:
        written = json.loads((folder / GENAI_CONFIG).read_bytes())
        return folder / str(written["model"]["decoder"]["filename"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _holds_model(folder: Path) -> bool:
    return _has(folder, GENAI_CONFIG) or _has(folder, _CONFIG)


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _is_model(folder: Path) -> bool:
    if _has(folder, GENAI_CONFIG):
        return True
    return _has(folder, _CONFIG) and next(folder.glob("*.safetensors"), None) is not None


def _subfolders(folder: Path, levels: int) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield child
            # Below a model there is only what belongs to it, such as the folder it is made from.
            if levels > 1 and not _is_model(child):
                yield from _subfolders(child, levels - 1)

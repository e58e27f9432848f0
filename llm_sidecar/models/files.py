"""Finds the files of each model, from the settings."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import quote

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.folders import GGUF, gguf_files, model_folders, onnx_file
from llm_sidecar.models.prompts import Prompts, read_prompts
from llm_sidecar.settings import DEFAULT_HERMES, DEFAULT_PHI3, Settings

DEMO_DIR: Final = Path(__file__).resolve().parents[1] / "demo"
_DEMO_PHI3_FILE: Final = DEMO_DIR / "phi3" / "model.onnx"
_SMALLEST_CONTEXT: Final = 4096
"""Of Phi-3-mini-4k-instruct, in tokens."""
_MOST_NAMES: Final = 5
"""Folders that an error names."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        label: what `X-Model` and `/health` call it: `phi3/<folder>`, or `phi3/demo`.
        folder: holds the files that an engine loads.
        notes: where the loaded files differ from the path, one sentence each.
        file: the .gguf file to load; None if the whole folder is the model.
        prompts: that it was trained on; None if it has none of its own.
    """

    label: str
    folder: Path
    notes: tuple[str, ...] = ()
    file: Path | None = None
    prompts: Prompts | None = None

    @property
    def model(self) -> Path:
        """What `load_engine` takes: the file, or the folder."""
        return self.file or self.folder


def locate_phi3(settings: Settings) -> ModelFiles:
    """Finds Phi-3's files.

    Raises:
        ModelUnavailable: there are none; names the variable to set.
    """
    return _locate(
        "phi3", "MICRO_LLM_MODEL_PATH", settings.models.phi3_path, DEFAULT_PHI3, settings
    )


def locate_hermes(settings: Settings) -> ModelFiles:
    """Finds Hermes' files, and its prompts.

    Raises:
        ModelUnavailable: there are none (names the variable to set), or its prompts are broken.
    """
    found = _locate(
        "hermes", "HERMES_MODEL_PATH", settings.models.hermes_path, DEFAULT_HERMES, settings
    )
    return replace(found, prompts=read_prompts(found.folder))


def phi3_context_length(settings: Settings) -> int:
    """Phi-3's context length in tokens, from its configuration; without one, and on another server,
    the smallest of any Phi-3."""
    if settings.models.phi3_urls:
        return _SMALLEST_CONTEXT
    with contextlib.suppress(ModelUnavailable, OSError, ValueError, KeyError, TypeError):
        files = locate_phi3(settings)
        if files.file is not None:
            # llama.cpp holds at least this.
            return _SMALLEST_CONTEXT
        folder = files.folder
        genai = folder / "genai_config.json"
        if genai.is_file():
            model = json.loads(genai.read_bytes())["model"]
            window = model.get("decoder", {}).get("sliding_window", {}).get("window_size", math.inf)
            return int(min(model["context_length"], window))
        config = json.loads((folder / "config.json").read_bytes())
        return int(config["max_position_embeddings"])
    return _SMALLEST_CONTEXT


def phi3_model_file(settings: Settings) -> Path:
    """The path of Phi-3's model file, or of the demo's if that replaces it; it may not exist."""
    path = settings.models.phi3_path or DEFAULT_PHI3
    if settings.models.phi3_path is None and settings.models.demo and not _anything_at(path):
        return _DEMO_PHI3_FILE
    return path


def few_shot_examples(settings: Settings) -> int:
    """The maximum number of few-shot examples in Phi-3's prompt.

    The default for the demo model is none: examples make it worse (see its card).
    """
    if settings.proposals.few_shot_examples is not None:
        return settings.proposals.few_shot_examples
    is_demo = not settings.models.phi3_urls and phi3_model_file(settings) == _DEMO_PHI3_FILE
    return 0 if is_demo else 3


def phi3_model_file_exists(settings: Settings) -> bool:
    """Whether the file of `phi3_model_file` exists and is accessible, or another that is loaded in
    its place."""
    if _exists(phi3_model_file(settings)):
        return True
    try:
        files = locate_phi3(settings)
        located = files.file or onnx_file(files.folder)
    except ModelUnavailable:
        return False
    return located is not None and _exists(located)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # For example, the folder is not readable, or the name is too long.
        return False


def _anything_at(path: Path) -> bool:
    """Whether a model was put there; an empty folder is a mount point with nothing mounted."""
    try:
        return path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None)
    except OSError:
        # A file that cannot be read may be a model: an error is better than a demo model instead.
        return True


def _locate(
    name: str, variable: str, configured: Path | None, default: Path, settings: Settings
) -> ModelFiles:
    path = configured or default
    if configured is None and settings.models.demo and not _anything_at(path):
        return ModelFiles(f"{name}/demo", DEMO_DIR / name)
    try:
        found = gguf_files(path) if path.suffix == GGUF else model_folders(path)
        found = found or gguf_files(path)
        if len(found) == 1:
            return _model_files(name, path, found[0], settings)
        what = "holds no genai_config.json or config.json" if path.exists() else "does not exist"
        if found:
            what = f"holds {len(found)} models, in {_names(path, found)}"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    # A demo model never replaces one that is configured.
    demo = configured is None and not settings.models.demo
    raise ModelUnavailable(
        f"The {name} model is missing: {path} {what}; set {variable} to the model"
        + (", or SIDECAR_DEMO=true to try the demo models" if demo else ""),
        retry_after=30,
    )


def _model_files(name: str, path: Path, found: Path, settings: Settings) -> ModelFiles:
    notes = _notes(path, found)
    # Labels are quoted, because they are sent in a header.
    if found.suffix == GGUF:
        # Its own name: a link of a download cache leads to a file without one.
        label = f"{name}/{quote(found.stem)}"
        return ModelFiles(label, found.parent, notes, found)
    folder = found.resolve()
    return ModelFiles(f"{name}/{quote(folder.name)}", folder, notes)


def _notes(path: Path, folder: Path) -> tuple[str, ...]:
    """What differs between a configured path and the folder that is loaded."""
    if path.is_dir():
        return () if path == folder else (f"{path} holds one model, in {folder.relative_to(path)}",)
    file = onnx_file(folder)
    if path.suffix != ".onnx" or file is None or file.name == path.name:
        return ()
    return (f"genai_config.json names {file.name}, which is loaded instead of {path.name}",)


def _names(path: Path, folders: Sequence[Path]) -> str:
    names = [str(folder.relative_to(path)) for folder in folders[:_MOST_NAMES]]
    return ", ".join(names) + (" and others" if len(folders) > _MOST_NAMES else "")

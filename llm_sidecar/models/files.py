"""Finds the files of each model, from the settings."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.settings import DEFAULT_HERMES, DEFAULT_PHI3, Settings

DEMO_DIR: Final = Path(__file__).resolve().parents[1] / "demo"
_DEMO_PHI3_FILE: Final = DEMO_DIR / "phi3" / "model.onnx"
_SMALLEST_CONTEXT: Final = 4096
"""Of Phi-3-mini-4k-instruct, in tokens."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        label: what `X-Model` and `/health` call it: `phi3/<folder>`, or `phi3/demo`.
        folder: the files that an engine loads.
    """

    label: str
    folder: Path


def locate_phi3(settings: Settings) -> ModelFiles:
    """Finds Phi-3's files.

    Raises:
        ModelUnavailable: there are none; names the variable to set.
    """
    models = settings.models
    return _locate("phi3", "MICRO_LLM_MODEL_PATH", models.phi3_path, DEFAULT_PHI3, models.demo)


def locate_hermes(settings: Settings) -> ModelFiles:
    """Finds Hermes' files.

    Raises:
        ModelUnavailable: there are none; names the variable to set.
    """
    models = settings.models
    return _locate("hermes", "HERMES_MODEL_PATH", models.hermes_path, DEFAULT_HERMES, models.demo)


def phi3_context_length(settings: Settings) -> int:
    """Phi-3's context length in tokens, from its configuration; without one, the smallest of any
    Phi-3."""
    with contextlib.suppress(ModelUnavailable, OSError, ValueError, KeyError, TypeError):
        folder = locate_phi3(settings).folder
        genai = folder / "genai_config.json"
        if genai.is_file():
            return int(json.loads(genai.read_bytes())["model"]["context_length"])
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
    return 0 if phi3_model_file(settings) == _DEMO_PHI3_FILE else 3


def phi3_model_file_exists(settings: Settings) -> bool:
    """Whether the file of `phi3_model_file` exists and is accessible."""
    return _exists(phi3_model_file(settings))


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
    name: str, variable: str, configured: Path | None, default: Path, demo: bool
) -> ModelFiles:
    path = configured or default
    if configured is None and demo and not _anything_at(path):
        return ModelFiles(f"{name}/demo", DEMO_DIR / name)
    try:
        folder = (path.parent if path.is_file() else path).resolve()
        if any((folder / config).is_file() for config in ("genai_config.json", "config.json")):
            # Quoted, because it is sent in a header.
            return ModelFiles(f"{name}/{quote(folder.name)}", folder)
        what = "holds no genai_config.json or config.json" if path.exists() else "does not exist"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise ModelUnavailable(
        f"The {name} model is missing: {path} {what}; set {variable} to the model, "
        "or SIDECAR_DEMO=true to try the demo models",
        retry_after=30,
    )

"""Where the models are, which adapter is newest, and getters that load on first use and keep.

The server runs each model in a worker of its own (`model_host`) and takes only the finding from
here; the getters are for scripts, which get the model in their own process. As a program,
`python -m llm_sidecar.loader`, it prepares models: see `preparing`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from llm_sidecar.engines import Engine, load_engine
from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.settings import DEFAULT_HERMES, DEFAULT_PHI3, Settings

DEMO_DIR: Final = Path(__file__).resolve().parent / "demo"
_DEMO_PHI3_FILE: Final = DEMO_DIR / "phi3" / "model.onnx"
_SMALLEST_CONTEXT: Final = 4096
"""Of Phi-3-mini-4k-instruct, in tokens."""
_ADAPTER_NAME: Final = re.compile(r"([0-9]{8})(-dpo)?")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        label: what `X-Model` and `/health` call it: `phi3/<folder>`, or `phi3/demo`.
        folder: holds the files an engine loads.
    """

    label: str
    folder: Path


def locate_phi3(settings: Settings) -> ModelFiles:
    """Phi-3's files.

    Raises:
        ModelUnavailable: there are none; names the variable to set.
    """
    return _locate("phi3", "MICRO_LLM_MODEL_PATH", settings.phi3_path, DEFAULT_PHI3, settings)


def locate_hermes(settings: Settings) -> ModelFiles:
    """Hermes' files.

    Raises:
        ModelUnavailable: there are none; names the variable to set.
    """
    return _locate("hermes", "HERMES_MODEL_PATH", settings.hermes_path, DEFAULT_HERMES, settings)


def phi3_context_length(settings: Settings) -> int:
    """Phi-3's context length in tokens, from its configuration; the smallest of any Phi-3 where
    there is none."""
    with contextlib.suppress(ModelUnavailable, OSError, ValueError, KeyError, TypeError):
        folder = locate_phi3(settings).folder
        genai = folder / "genai_config.json"
        if genai.is_file():
            return int(json.loads(genai.read_bytes())["model"]["context_length"])
        config = json.loads((folder / "config.json").read_bytes())
        return int(config["max_position_embeddings"])
    return _SMALLEST_CONTEXT


def phi3_model_file(settings: Settings) -> Path:
    """Where Phi-3's model file is looked for; the demo's where the demo stands in."""
    path = settings.phi3_path or DEFAULT_PHI3
    if settings.phi3_path is None and settings.demo and not _anything_at(path):
        return _DEMO_PHI3_FILE
    return path


def few_shot_examples(settings: Settings) -> int:
    """How many examples Phi-3 is shown at most.

    Unless set, none where it is the demo model: examples make that one worse (see its card).
    """
    if settings.few_shot_examples is not None:
        return settings.few_shot_examples
    return 0 if phi3_model_file(settings) == _DEMO_PHI3_FILE else 3


def phi3_model_file_exists(settings: Settings) -> bool:
    """Whether that file is there and may be seen."""
    return _exists(phi3_model_file(settings))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A folder that may not be read, a name that is too long.
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
    if configured is None and settings.demo and not _anything_at(path):
        return ModelFiles(f"{name}/demo", DEMO_DIR / name)
    try:
        folder = (path.parent if path.is_file() else path).resolve()
        if any((folder / config).is_file() for config in ("genai_config.json", "config.json")):
            # Quoted, because it travels in a header.
            return ModelFiles(f"{name}/{quote(folder.name)}", folder)
        what = "holds no genai_config.json or config.json" if path.exists() else "does not exist"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise ModelUnavailable(
        f"The {name} model is missing: {path} {what}; set {variable} to the model, "
        "or SIDECAR_DEMO=true to try the demo models",
        retry_after=30,
    )


def get_latest_adapter_dir(base_path: Path | str) -> Path | None:
    """The newest dated adapter.

    Args:
        base_path: folder of adapters.

    Returns:
        The newest `YYYYMMDD` or `YYYYMMDD-dpo` folder that holds an `adapter_config.json`, the
        `-dpo` one of two of the same date; None where there is none.

    Raises:
        AdapterRejected: the folder cannot be read.
    """
    return max(_adapters(base_path), default=(None, None, None))[2]


def find_adapter_dir(base_path: Path | str, name: str) -> Path:
    """The adapter of a name, or of a date: its `-dpo` one before its plain one.

    Args:
        base_path: folder of adapters.
        name: `YYYYMMDD` or `YYYYMMDD-dpo`.

    Raises:
        AdapterRejected: there is none, or the folder cannot be read.
    """
    found = [a for a in _adapters(base_path) if a[1] == name or a[1].partition("-")[0] == name]
    if not found:
        raise AdapterRejected(
            "There is no such adapter: PHI3_ADAPTER_DIR holds no folder of that name with an "
            "adapter_config.json."
        )
    return max(found)[2]


def _adapters(base_path: Path | str) -> list[tuple[datetime.date, str, Path]]:
    """(date, name, folder) of each dated adapter."""
    base = Path(base_path)
    try:
        dated = [(adapter_date(path), path.name, path) for path in base.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AdapterRejected(
            f"The adapters cannot be read: {base}: {error.strerror}; set PHI3_ADAPTER_DIR."
        ) from None
    return [
        (date, name, path) for date, name, path in dated if date is not None and holds_adapter(path)
    ]


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter; also True if that cannot be read, as loading says why.

    Symbolic links are followed, also out of the folder of adapters: operators keep adapters on
    other disks, and no client sees the target of a link.
    """
    try:
        return (folder / "adapter_config.json").is_file()
    except OSError:
        return True


def adapter_date(folder: Path) -> datetime.date | None:
    """The date in an adapter folder's name; None where the name is no date."""
    match = _ADAPTER_NAME.fullmatch(folder.name)
    if match is None:
        return None
    try:
        return datetime.date.fromisoformat(match[1])
    except ValueError:
        return None


def load_phi3_model() -> Engine:
    """Loads Phi-3 into this process, as the environment says.

    Raises:
        SettingsError, ModelUnavailable: as the environment or the files are wrong.
    """
    settings = Settings.from_environ()
    folder = locate_phi3(settings).folder
    return load_engine(folder, device=settings.device, threads=settings.phi3_threads)


def load_hermes_model() -> Engine:
    """Loads Hermes into this process, as the environment says.

    Raises:
        SettingsError, ModelUnavailable: as the environment or the files are wrong.
    """
    settings = Settings.from_environ()
    folder = locate_hermes(settings).folder
    return load_engine(folder, device=settings.device, threads=settings.hermes_threads)


get_phi3_engine = functools.cache(load_phi3_model)
get_hermes_engine = functools.cache(load_hermes_model)


def get_phi3_model_and_tokenizer() -> tuple[Any, Any]:
    """The runtime's own Phi-3 model and a tokenizer, loaded on first use and kept.

    For a model in transformers' format the tokenizer is that of transformers, otherwise one of the
    `tokenizers` package, because onnxruntime-genai's own tokenizer crashes the process on some
    texts.

    Raises:
        SettingsError, ModelUnavailable: as the environment or the files are wrong.
    """
    engine: Any = get_phi3_engine()
    return engine.model, engine.tokenizer


def get_hermes_model_and_tokenizer() -> tuple[Any, Any]:
    """The runtime's own Hermes model and a tokenizer; see `get_phi3_model_and_tokenizer`.

    Raises:
        SettingsError, ModelUnavailable: as the environment or the files are wrong.
    """
    engine: Any = get_hermes_engine()
    return engine.model, engine.tokenizer


if __name__ == "__main__":
    import sys

    from llm_sidecar.preparing import main

    sys.exit(main())

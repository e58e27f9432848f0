"""Models and adapters for scripts: their locations, and getters that load a model into this
process.

The server runs each model in a worker process of its own (`llm_sidecar.models.local`). As a
program, `python -m llm_sidecar.loader`, it converts models and adapters.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from llm_sidecar.engines import Engine, load_engine
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.adapters import adapter_date, find_adapter_dir, get_latest_adapter_dir
from llm_sidecar.models.files import locate_hermes, locate_phi3
from llm_sidecar.models.options import hermes_options, phi3_options
from llm_sidecar.settings import Settings

__all__ = [
    "adapter_date",
    "find_adapter_dir",
    "get_hermes_engine",
    "get_hermes_model_and_tokenizer",
    "get_latest_adapter_dir",
    "get_phi3_engine",
    "get_phi3_model_and_tokenizer",
    "load_hermes_model",
    "load_phi3_model",
    "locate_hermes",
    "locate_phi3",
]


def load_phi3_model() -> Engine:
    """Loads Phi-3 into this process, as the environment configures it.

    Raises:
        SettingsError, ModelUnavailable: a variable or the model's files are not valid.
    """
    settings = Settings.from_environ()
    return load_engine(locate_phi3(settings).model, **asdict(phi3_options(settings)))


def load_hermes_model() -> Engine:
    """Loads Hermes into this process, as the environment configures it.

    Raises:
        SettingsError, ModelUnavailable: a variable or the model's files are not valid.
    """
    settings = Settings.from_environ()
    return load_engine(locate_hermes(settings).model, **asdict(hermes_options(settings)))


get_phi3_engine = functools.cache(load_phi3_model)
get_hermes_engine = functools.cache(load_hermes_model)


def get_phi3_model_and_tokenizer() -> tuple[Any, Any]:
    """The runtime's own Phi-3 model and a tokenizer, loaded on first use and kept.

    For a model in transformers' format the tokenizer is that of transformers, otherwise one of the
    `tokenizers` package, because onnxruntime-genai's own tokenizer crashes the process on some
    texts.

    Raises:
        SettingsError, ModelUnavailable: a variable or the model's files are not valid, or the model
            is a .gguf file, which llama.cpp holds in another process.
    """
    return _model_and_tokenizer(get_phi3_engine())


def get_hermes_model_and_tokenizer() -> tuple[Any, Any]:
    """The runtime's own Hermes model and a tokenizer; see `get_phi3_model_and_tokenizer`.

    Raises:
        SettingsError, ModelUnavailable: see `get_phi3_model_and_tokenizer`.
    """
    return _model_and_tokenizer(get_hermes_engine())


def _model_and_tokenizer(engine: Any) -> tuple[Any, Any]:
    if engine.runtime == "llama.cpp":
        raise ModelUnavailable(
            "llama.cpp holds a .gguf model in another process; use get_hermes_engine or "
            "get_phi3_engine, whose methods are those of all engines"
        )
    return engine.model, engine.tokenizer

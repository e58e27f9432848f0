"""Loads a model into this process and identifies it: its files, packages and processor."""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from llm_sidecar.engines import Engine
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.local.fingerprints import (
    Fingerprints,
    fingerprint_of_transformers,
    fingerprints_of,
)
from llm_sidecar.models.local.protocol import Load
from llm_sidecar.models.local.warm_up import load_warm
from llm_sidecar.models.status import Speed

_PACKAGES: Final = {
    "jinja2": "jinja2",
    "llguidance": "llguidance",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "peft": "peft",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
}
"""The packages that affect a generated text, from chat template to sampling, and their modules."""
_CPUS: Final = Path("/proc/cpuinfo")


def load_identified(load: Load) -> tuple[Engine, ModelIdentity, Speed | None]:
    """Loads an engine and measures its speed, as `load_warm` does, and identifies the model.

    Raises:
        SidecarError: the model cannot be loaded; says why.
        OSError: a file cannot be read.
    """
    # In parallel with the load, because reading and hashing release the GIL.
    with ThreadPoolExecutor(1) as executor:
        adapter = None if load.adapter is None else Path(load.adapter)
        fingerprints = executor.submit(fingerprints_of, Path(load.model), adapter)
        engine, speed = load_warm(load)
        return engine, _identity(load, engine, fingerprints.result()), speed


def _identity(load: Load, engine: Engine, found: Fingerprints) -> ModelIdentity:
    prefill = engine.prefill_folder
    return ModelIdentity(
        model_files=found.model,
        adapter_files=found.adapter,
        tokenizer_files=found.tokenizer,
        runtime=engine.runtime,
        versions={**_versions(), **engine.versions},
        device=engine.device,
        processor=_processor(),
        threads=load.options.threads if engine.device == "cpu" else None,
        # Rows of an older version, which had float32 only, have none.
        dtype=None if engine.dtype == "float32" else engine.dtype,
        prefill_files=None if prefill is None else fingerprint_of_transformers(prefill),
    )


def _versions() -> dict[str, str]:
    """The versions of the packages that this process has imported."""
    return {
        package: str(sys.modules[module].__version__)
        for package, module in _PACKAGES.items()
        if module in sys.modules
    }


def _processor() -> str:
    """The name of the CPU, or its architecture where the system does not say more."""
    try:
        for line in _CPUS.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.machine()

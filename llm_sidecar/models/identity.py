"""The identity of a loaded model, so that a stored text can be traced to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The files and the runtime of a model. A field is None if a remote server does not report it.

    Attributes:
        model_files, adapter_files, tokenizer_files: fingerprints; that of the adapter is None
            without one. `models.local.fingerprints` defines them.
        runtime: the package that runs the model.
        versions: of the packages that take part, by name.
        device: `cpu` or `cuda`.
        processor: the name of the CPU; its instructions decide which kernels run.
        threads: of the runtime, on CPU.
        dtype: `bfloat16` or `float16` if torch computes in that; None if it computes in float32 or
            is not used.
        prefill_files: fingerprint of the transformers folder, if torch does the prefill for another
            runtime; else None.
    """

    model_files: str | None = None
    adapter_files: str | None = None
    tokenizer_files: str | None = None
    runtime: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    processor: str | None = None
    threads: int | None = None
    dtype: str | None = None
    prefill_files: str | None = None

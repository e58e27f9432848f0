"""The rows of the table of `make bench`, and the text above it."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from benchmarks import models

PACKAGES: Final = (
    "onnxruntime-genai",
    "onnxruntime",
    "torch",
    "transformers",
    "fastapi",
    "uvicorn",
)


@dataclass(frozen=True)
class Row:
    """One measured promise.

    Attributes:
        wanted: the greatest acceptable value, or None.
        detail: the measured values behind it.
        missed: why the value may be greater.
    """

    name: str
    value: float
    wanted: float | None
    detail: str
    unit: str = ""
    missed: str = ""

    def __str__(self) -> str:
        kept = self.wanted is None or self.value <= self.wanted
        reached = f"{self.value:.3g}{self.unit}{'' if kept else ' (missed)'}"
        why = "" if kept or not self.missed else f"; {self.missed}"
        limit = "" if self.wanted is None else f"at most {self.wanted:.3g}{self.unit}"
        return f"| {self.name} | {reached} | {limit} | {self.detail}{why} |"


def processor() -> str:
    """The processor, its cores and the Python."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def machine() -> list[str]:
    """The text above the table."""
    installed = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {installed}. "
        f"{models.THREADS} threads a model; "
        f"Phi-3 of {models.size(models.transformers_model('phi3'))} parameters, Llama of "
        f"{models.size(models.transformers_model('llama'))}, both in int4 unless a row says "
        "otherwise. Ratios are of medians.",
    ]

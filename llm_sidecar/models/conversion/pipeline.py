"""Converts a model, measures the result against its source, and keeps it only if it is as good."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from llm_sidecar.engines.chat_template import read_template
from llm_sidecar.engines.checkpoint import quantization_method
from llm_sidecar.engines.handover import FOLDER as SOURCE_LINK
from llm_sidecar.engines.sampling import SAMPLING_FILE
from llm_sidecar.models.conversion import child, resources, steps
from llm_sidecar.models.conversion.builder import Precision, build
from llm_sidecar.models.conversion.errors import ConversionFailed
from llm_sidecar.models.conversion.options import INT4, INT8, Option
from llm_sidecar.models.conversion.quality import Measurement, compare
from llm_sidecar.models.conversion.trials import Conversion, Trial, closest
from llm_sidecar.models.local.fingerprints import fingerprints_of
from llm_sidecar.models.prompts import PROMPTS_FILE

MAX_PERPLEXITY_RATIO: Final = 1.05
GRAPH: Final = "model.onnx"
RECORD: Final = "conversion.json"
"""The file beside the result with what was measured."""
_COPIED: Final = (SAMPLING_FILE, PROMPTS_FILE)
"""Files of the source that decide what the model answers, and that the builder leaves out."""

_OPTIONS: Final[dict[Precision, Sequence[Option]]] = {
    "int4": (*INT4, *INT8),
    "int8": INT8,
    "fp32": (),
}
_PACKAGES: Final = ("onnxruntime", "onnxruntime-genai", "torch", "transformers", "tokenizers")

_SMALL: Final = 1 << 24
"""Weights of a model that a second thread does not make faster."""

Report = Callable[[str], None]


def convert(
    source: Path,
    out: Path,
    precision: Precision,
    report: Report = lambda line: None,
    *,
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO,
) -> Conversion:
    """Converts the model in `source`; `out` appears only if a result is good enough.

    Options are tried from the smallest to the largest, and the first that is good enough is kept.
    With int4, int8 is the last option.

    Args:
        source: config.json, *.safetensors and the tokenizer with its chat template.
        out: a folder that does not exist yet.
        precision: of the weights.
        report: called with one line of progress for each step.
        max_perplexity_ratio: of result and source, on the shipped text.

    Raises:
        ConversionFailed: the model cannot be converted, no result is good enough, or this machine
            has too little memory or disk.
        ModelUnavailable: the source has no chat template, or no engine loads it.
    """
    weights = _check_source(source, out)
    needs = resources.needs_of(weights, precision)
    report(
        f"Converting takes up to {resources.shown(needs.memory)} of memory and "
        f"{resources.shown(needs.disk)} of disk"
    )
    existing = next(folder for folder in out.absolute().parents if folder.is_dir())
    resources.check(needs, existing)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        child.ended_by_signals(),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder,
    ):
        run = _Run(source, weights, Path(folder), report, max_perplexity_ratio)
        conversion = run.convert(precision)
        steps.prune(run.result / GRAPH)
        _add_files(source, run.result)
        (run.result / RECORD).write_text(json.dumps(run.record(conversion, precision), indent=2))
        run.result.rename(out)
    return conversion


def _check_source(source: Path, out: Path) -> resources.Weights:
    if source.suffix == ".gguf":
        raise ConversionFailed(f"{source} is a GGUF, which is served as it is")
    if not (source / "config.json").is_file():
        raise ConversionFailed(f"{source} holds no config.json; name a transformers folder")
    if not any(source.glob("*.safetensors")):
        raise ConversionFailed(f"{source} holds no *.safetensors; other formats can run code")
    if out.exists() or out.is_symlink():
        raise ConversionFailed(f"{out} already exists; name another folder or remove it")
    if (method := quantization_method(source)) is not None:
        raise ConversionFailed(
            f"the weights in {source} are quantized already ({method}); convert the original model"
        )
    read_template(source)
    return resources.read_weights(source)


def _add_files(source: Path, result: Path) -> None:
    """Adds what belongs to the model beside its weights, and a link to the source."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, result / name)
    (result / SOURCE_LINK).symlink_to(source.resolve())


class _Run:
    """One conversion.

    Attributes:
        result: the folder of the result that is kept.
    """

    def __init__(
        self,
        source: Path,
        weights: resources.Weights,
        folder: Path,
        report: Report,
        max_ratio: float,
    ) -> None:
        self._source = source
        self._weights = weights
        self._folder = folder
        self._report = report
        self._max_ratio = max_ratio
        self._threads = 1 if weights.count < _SMALL else os.cpu_count() or 1
        self._peaks: dict[str, int] = {}
        self.result = folder / "base"

    def convert(self, precision: Precision) -> Conversion:
        base = self.result
        self._build(base, precision)
        self._report("Measuring the source")
        source = self._measure(self._source)
        trials: list[Trial] = []
        if precision == "fp32":
            trials.append(self._trial("float32", base, source))
        for option in _OPTIONS[precision]:
            self._report(f"Trying {option.name}")
            self.result = self._folder / f"trial-{len(trials)}"
            self._keep_peak("quantizing", steps.quantize(base, self.result, option))
            trials.append(self._trial(option.name, self.result, source))
            if trials[-1].refusal is None:
                break
            shutil.rmtree(self.result)
        if (last := trials[-1]).refusal is not None:
            raise ConversionFailed(self._failure(trials))
        fallback = precision == "int4" and not last.name.startswith("int4")
        return Conversion(self._weights.size, source, trials, fallback)

    def _build(self, base: Path, precision: Precision) -> None:
        # Quantized, embedding and head have other layouts; they must be apart for that.
        options = {} if precision == "fp32" else {"shared_embeddings": "false"}
        self._keep_peak("building", build(self._source, base, "fp32", self._report, options))

    def _trial(self, name: str, folder: Path, source: Measurement) -> Trial:
        found = self._measure(folder)
        if found.text != source.text:
            raise ConversionFailed(
                "the converted tokenizer splits text differently than the original"
            )
        quality = compare(source, found)
        size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        refusal = quality.refusal(self._max_ratio)
        return Trial(name, size, found.perplexity, quality, refusal)

    def _measure(self, folder: Path) -> Measurement:
        found, peak = steps.measure(folder, self._threads)
        self._keep_peak("measuring", peak)
        return found

    def _keep_peak(self, step: str, peak: int) -> None:
        self._peaks[step] = max(peak, self._peaks.get(step, 0))

    def _failure(self, trials: Sequence[Trial]) -> str:
        best = closest(trials)
        return (
            f"no result is good enough. The closest is {best.name}: {best.refusal}; at most "
            f"{self._max_ratio:g} is accepted (--max-perplexity-ratio)"
        )

    def record(self, conversion: Conversion, precision: Precision) -> dict[str, Any]:
        """What was measured, as JSON types."""
        fingerprints = fingerprints_of(self._source, None)
        return {
            "source": {
                "model_files": fingerprints.model,
                "tokenizer_files": fingerprints.tokenizer,
                "bytes": conversion.source_size,
                "perplexity": conversion.source.perplexity,
                "tokens": conversion.source.tokens,
                "text": conversion.source.text,
            },
            "precision": precision,
            "max_perplexity_ratio": self._max_ratio,
            "kept": conversion.kept.name,
            "trials": [dataclasses.asdict(trial) for trial in conversion.trials],
            "peak_memory_bytes": self._peaks,
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        }

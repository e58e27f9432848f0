"""Converts a PEFT LoRA adapter for a model on onnxruntime.

    python -m llm_sidecar.loader adapter PEFT_DIR OUT_DIR

PEFT names its matrices after the modules of transformers, whereas some projections of the graph are
packed. The result is kept only if the model runs with it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.lora_graph import (
    ADAPTER_FILE,
    Projection,
    read_lora_graph,
    write_adapter,
)
from llm_sidecar.engines.peft_files import CONFIG_FILE, WEIGHTS_FILE, matrix_of, read_config
from llm_sidecar.errors import AdapterRejected
from llm_sidecar.models.conversion import ConversionFailed
from llm_sidecar.models.distance import adapter_distance
from llm_sidecar.models.patterns import PatternsFailed, first_matches

_PROJECTION: Final = re.compile(r"model\.layers\.\d+\.\w+\.\w+")

_Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class _Piece(NamedTuple):
    """Rows of a module's output, and their position in a projection's output."""

    module: str
    rows: slice
    at: int


def convert_adapter(source: Path, base: Path, out: Path) -> float:
    """Converts the adapter in `source`; `out` appears only on success.

    Args:
        source: adapter_config.json and adapter_model.safetensors, as PEFT writes them.
        base: folder of the model that it is for, as onnxruntime-genai's builder writes it.
        out: a folder that does not exist yet, usually `YYYYMMDD`.

    Returns:
        The mean total variation distance, from 0 to 1, between the next-token probabilities with
        and without the adapter, on a few prompts.

    Raises:
        ConversionFailed: the adapter cannot be converted for the model.
        AdapterRejected: the model does not run with it.
    """
    if out.exists():
        raise ConversionFailed(f"{out} already exists; name another folder or remove it")
    if not (base / "genai_config.json").is_file():
        raise ConversionFailed(
            f"{base} is not a model for onnxruntime; on torch the sidecar takes a PEFT folder "
            "unchanged"
        )
    written = json.loads((base / "genai_config.json").read_bytes())["model"]["decoder"]
    graph = read_lora_graph(base / written["filename"])
    matrices = _fitted(_read(source), graph.projections, _attention_rows(written))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made = Path(folder, out.name)
        made.mkdir()
        shutil.copyfile(source / CONFIG_FILE, made / CONFIG_FILE)
        write_adapter(made / ADAPTER_FILE, matrices)
        moved = adapter_distance(base, made)
        made.rename(out)
    return moved


def _read(source: Path) -> dict[str, _Pair]:
    """A (inputs, rank) and scaled B (rank, outputs) of each module, in float32."""
    # Imported here, because only this command needs it; PEFT depends on it.
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = read_config(source)
        tensors = load_file(source / WEIGHTS_FILE)
        placed = {matrix_of(name): tensor for name, tensor in tensors.items()}
    except AdapterRejected as error:
        raise ConversionFailed(f"{source} cannot be converted: {error.detail}") from None
    except (ValueError, SafetensorError) as error:
        raise ConversionFailed(f"{source}: {WEIGHTS_FILE} cannot be read: {error}") from None
    halves: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for (module, half), tensor in placed.items():
        if not _PROJECTION.fullmatch(module) or tensor.ndim != 2 or 0 in tensor.shape:
            raise ConversionFailed(
                f"{source} changes {module}, which is not a projection of a layer"
            )
        halves.setdefault(module, {})[half] = tensor.astype(np.float32)
    if not halves:
        raise ConversionFailed(f"{source} changes nothing")
    try:
        alphas = _alphas(config, list(halves))
    except PatternsFailed as error:
        raise ConversionFailed(f"{source}: alpha_pattern in {CONFIG_FILE} {error}") from None
    found = {}
    for module, pair in halves.items():
        if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise ConversionFailed(f"{source} holds two matrices of {module} that do not fit")
        alpha, rank = alphas[module], len(pair["A"])
        if not isinstance(alpha, int | float):
            raise ConversionFailed(f"{source}: {CONFIG_FILE} has no alpha for {module}")
        # rsLoRA: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with
        # LoRA", arXiv:2312.03732.
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[module] = (pair["A"].T, pair["B"].T * scaling)
    return found


def _alphas(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The alpha of each module, by the configuration."""
    own = config.get("alpha_pattern") or {}
    if not isinstance(own, dict):
        raise PatternsFailed("is not an object")
    alphas = list(own.values())
    return {
        module: config.get("lora_alpha") if index is None else alphas[index]
        for module, index in zip(modules, first_matches(list(own), modules), strict=True)
    }


def _attention_rows(decoder: Mapping[str, Any]) -> dict[str, slice]:
    """The rows of queries, keys and values in the output of a packed projection."""
    size = decoder["head_size"]
    queries, others = decoder["num_attention_heads"] * size, decoder["num_key_value_heads"] * size
    ends = (queries, queries + others, queries + 2 * others)
    starts = (0, *ends)
    return {
        f"{letter}_proj": slice(start, end)
        for letter, start, end in zip("qkv", starts, ends, strict=False)
    }


def _fitted(
    modules: Mapping[str, _Pair],
    projections: Mapping[str, Projection],
    attention: Mapping[str, slice],
) -> dict[str, _Pair]:
    """The matrices of each projection that the modules change.

    Raises:
        ConversionFailed: a module has no projection, or another width.
    """
    used: set[str] = set()
    fitted: dict[str, _Pair] = {}
    for name, projection in projections.items():
        pieces = [p for p in _pieces(name, projection, attention) if p.module in modules]
        if not pieces:
            continue
        ranks = [modules[piece.module][0].shape[1] for piece in pieces]
        first = np.concatenate([modules[piece.module][0] for piece in pieces], axis=1)
        second = np.zeros((sum(ranks), projection.outputs), np.float32)
        begin = 0
        for piece, rank in zip(pieces, ranks, strict=True):
            rows = modules[piece.module][1][:, piece.rows]
            if len(first) != projection.inputs or piece.at + rows.shape[1] > projection.outputs:
                raise ConversionFailed(
                    f"{piece.module} is of another width than the model's {name}; is the adapter "
                    "for another model?"
                )
            second[begin : begin + rank, piece.at : piece.at + rows.shape[1]] = rows
            begin += rank
            used.add(piece.module)
        fitted[name] = first.astype(projection.dtype), second.astype(projection.dtype)
    if missing := sorted(modules.keys() - used):
        raise ConversionFailed(
            f"the model has no {missing[0]} to change; is the adapter for another model?"
        )
    return fitted


def _pieces(name: str, projection: Projection, attention: Mapping[str, slice]) -> Iterator[_Piece]:
    """Modules of transformers that may equal a projection, be part of it or contain it."""
    layer, part, projected = name.rsplit(".", 2)
    module = f"{layer}.{'self_attn' if part == 'attn' else part}"
    yield _Piece(f"{module}.{projected}", slice(None), 0)
    if projected == "qkv_proj":
        for one, rows in attention.items():
            yield _Piece(f"{module}.{one}", slice(None), rows.start)
    elif projected in attention:
        yield _Piece(f"{module}.qkv_proj", attention[projected], 0)
    elif projected in ("gate_proj", "up_proj"):
        begin = 0 if projected == "gate_proj" else projection.outputs
        yield _Piece(f"{module}.gate_up_proj", slice(begin, begin + projection.outputs), 0)

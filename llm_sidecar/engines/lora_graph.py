"""Adds inputs for a LoRA adapter to a model's ONNX graph.

    output = weight(input) + (input @ A) @ B

for every projection of every layer (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language
Models", arXiv:2106.09685), with B scaled already. All A and B are graph inputs of any rank, zero by
default. So one graph takes adapters of any rank for any projections, and without an adapter its
outputs equal the original's exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from llm_sidecar.errors import AdapterRejected

ADAPTER_FILE: Final = "adapter.onnx_adapter"
"""onnxruntime's AdapterFormat, in an adapter's folder."""

_PROJECTION: Final = re.compile(r"/(model/layers\.\d+/(?:attn|mlp)/\w+_proj)/MatMul\w*")
_MAX_OVERHEAD: Final = 1 << 20
"""Maximum number of bytes for names and padding in an adapter file."""
_TYPES: Final[dict[int, type[np.floating[Any]]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
}


class Projection(NamedTuple):
    """A linear map of the graph that an adapter can change.

    Attributes:
        inputs, outputs: its widths.
        dtype: of its input and output.
    """

    inputs: int
    outputs: int
    dtype: type[np.floating[Any]]


class LoraGraph(NamedTuple):
    """A graph with inputs for adapters, and the projections that they can change.

    Attributes:
        serialized: the ONNX model; weights that it keeps in other files stay there.
        projections: by the name that begins the names of their inputs, `….lora_A` of shape
            (inputs, rank) and `….lora_B` of shape (rank, outputs).
    """

    serialized: bytes
    projections: Mapping[str, Projection]


def read_lora_graph(file: Path) -> LoraGraph:
    """The graph in `file`, as onnxruntime-genai's builder writes it, with inputs for adapters.

    Raises:
        AdapterRejected: it has no projections that an adapter can change.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    projections: dict[str, Projection] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        match = _PROJECTION.fullmatch(node.name)
        projection = _projection(node, weights) if match else None
        if match and projection:
            name = match[1].replace("/", ".")
            projections[name] = projection
            nodes += _added(graph, node, name, projection)
    if not projections:
        raise AdapterRejected(f"the graph in {file} has no projections that an adapter can change")
    del graph.node[:]
    graph.node.extend(nodes)
    return LoraGraph(model.SerializeToString(), projections)


def _projection(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> Projection | None:
    if node.op_type == "MatMulNBits":
        widths = {attribute.name: attribute.i for attribute in node.attribute}
        inputs, outputs, like = widths["K"], widths["N"], weights.get(node.input[2])
    elif node.op_type == "MatMul" and (like := weights.get(node.input[1])) is not None:
        inputs, outputs = like.dims
    else:
        return None
    dtype = None if like is None else _TYPES.get(like.data_type)
    return None if dtype is None else Projection(inputs, outputs, dtype)


def _added(
    graph: onnx.GraphProto, node: onnx.NodeProto, name: str, projection: Projection
) -> list[onnx.NodeProto]:
    """Three nodes after `node` that add A and B to its output, under the same name."""
    first, second, rank = f"{name}.lora_A", f"{name}.lora_B", f"{name}.rank"
    shapes: dict[str, tuple[list[int | str], tuple[int, int]]] = {
        first: ([projection.inputs, rank], (projection.inputs, 1)),
        second: ([rank, projection.outputs], (1, projection.outputs)),
    }
    for tensor, (shape, default) in shapes.items():
        zero = numpy_helper.from_array(np.zeros(default, projection.dtype), tensor)
        graph.input.append(helper.make_tensor_value_info(tensor, zero.data_type, shape))
        graph.initializer.append(zero)
    output = node.output[0]
    node.output[0] = f"{output}/base"
    return [
        helper.make_node("MatMul", [node.input[0], first], [f"{output}/lora_A"], f"{output}/A"),
        helper.make_node(
            "MatMul", [f"{output}/lora_A", second], [f"{output}/lora_B"], f"{output}/B"
        ),
        helper.make_node("Add", [f"{output}/base", f"{output}/lora_B"], [output], f"{output}/lora"),
    ]


def with_constants(serialized: bytes, matrices: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A serialized graph in which these inputs are constants with shapes but without values.

    The session gets the values from `SessionOptions.add_external_initializers`.
    """
    model = onnx.load_model_from_string(serialized)
    graph = model.graph
    kept = [value for value in graph.input if value.name not in matrices]
    del graph.input[:]
    graph.input.extend(kept)
    for tensor in graph.initializer:
        if tensor.name in matrices:
            del tensor.dims[:]
            tensor.dims.extend(matrices[tensor.name].shape)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=ADAPTER_FILE)
    changed: bytes = model.SerializeToString()
    return changed


def write_adapter(file: Path, matrices: Mapping[str, tuple[npt.NDArray[Any], ...]]) -> None:
    """Writes A and B of projections, by the projections' names."""
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(
        {
            f"{name}.lora_{letter}": onnxruntime.OrtValue.ortvalue_from_numpy(matrix)
            for name, pair in matrices.items()
            for letter, matrix in zip("AB", pair, strict=True)
        }
    )
    adapter.export_adapter(str(file))


def read_adapter(
    folder: Path, projections: Mapping[str, Projection]
) -> dict[str, npt.NDArray[Any]]:
    """The matrices of the adapter in `folder`, by the names of the graph's inputs.

    Raises:
        AdapterRejected: it is missing or does not fit.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise AdapterRejected(
            f"it holds no {ADAPTER_FILE}; make one with python -m llm_sidecar.loader adapter"
        )
    if file.stat().st_size > _MAX_OVERHEAD + sum(map(_bytes, projections.values())):
        raise AdapterRejected(f"its {ADAPTER_FILE} is larger than the weights that it may change")
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
        # Copies: the values may be views of a mapping that ends with `adapter`.
        found = {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}
    except Exception:  # noqa: BLE001 - the runtime raises bare ones
        raise AdapterRejected(f"{file.name} is not an adapter, or is incomplete") from None
    ranks: dict[str, set[int]] = {}
    for name, matrix in found.items():
        projection, _, letter = name.rpartition(".lora_")
        expected = projections.get(projection)
        if expected is None or letter not in ("A", "B"):
            raise AdapterRejected(f"it changes {name}, which the model does not have")
        if matrix.ndim != 2:
            raise AdapterRejected(f"{name} is not a matrix")
        rank, width = matrix.shape[:: -1 if letter == "A" else 1]
        if width != (expected.inputs if letter == "A" else expected.outputs):
            raise AdapterRejected(f"{name} is {width} wide, which is not the model's width there")
        if matrix.dtype != expected.dtype:
            raise AdapterRejected(
                f"{name} is {matrix.dtype}, and the model computes in {np.dtype(expected.dtype)}"
            )
        if not np.isfinite(matrix).all():
            raise AdapterRejected(f"{name} holds infinities or NaN")
        ranks.setdefault(projection, set()).add(rank)
    incomplete = [
        name
        for name, its_ranks in ranks.items()
        if len(its_ranks) > 1 or not {f"{name}.lora_A", f"{name}.lora_B"} <= found.keys()
    ]
    if incomplete or not found:
        raise AdapterRejected(f"the two matrices of {next(iter(incomplete), 'anything')} differ")
    return found


def _bytes(projection: Projection) -> int:
    return projection.inputs * projection.outputs * np.dtype(projection.dtype).itemsize

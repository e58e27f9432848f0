"""Quantizes the ONNX model of the builder, weight by weight, in a process of its own.

    python -m llm_sidecar.models.conversion.quantizer BASE OUT OPTION

BASE holds the model in float32, OPTION is an `Option` as JSON. onnxruntime's own quantizer holds
the whole model in float32; this one holds one weight.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from llm_sidecar import command_line
from llm_sidecar.models.conversion.blocks import Quantized, quantize
from llm_sidecar.models.conversion.options import Method, Option

GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"

_ALIGNMENT: Final = 4096
"""Of each weight in the file, so that the runtime can map it."""
_DOMAIN: Final = "com.microsoft"
_INT8_ACTIVATIONS: Final = 4
"""MatMulNBits' accuracy level at which a CPU multiplies integers; the builder's default too."""
_LAYER: Final = re.compile(r"/model/layers\.(\d+)/(?:attn/(?:v|qkv)_proj|mlp/down_proj)/MatMul")
_HEAD: Final = "/lm_head/MatMul"


class _Quantizer:
    """One pass over the weights of a graph."""

    def __init__(self, base: Path, out: Path, option: Option) -> None:
        self._base = base
        self._option = option
        self._model = onnx.load(str(base / GRAPH), load_external_data=False)
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in self._model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        layers = [match[1] for name in self._names() if (match := _LAYER.fullmatch(name))]
        self._layers = 1 + max(map(int, layers), default=0)
        self._out = out
        self._tensors: list[TensorProto] = []
        self._written: dict[bytes, int] = {}

    def _names(self) -> list[str]:
        return [node.name for node in self._model.graph.node]

    def run(self) -> None:
        """Writes the graph and its weights."""
        graph = self._model.graph
        with (self._out / DATA).open("wb") as self._data, ThreadPoolExecutor() as self._executor:
            for tensor in graph.initializer:
                self._convert(tensor)
        del graph.initializer[:]
        graph.initializer.extend(self._tensors)
        onnx.save(self._model, str(self._out / GRAPH))

    def _convert(self, tensor: TensorProto) -> None:
        users = self._users.get(tensor.name, [])
        if len(users) == 1 and len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT:
            (node,) = users
            if node.op_type == "MatMul" and node.input[1] == tensor.name:
                return self._convert_projection(tensor, node)
            if node.op_type == "Gather" and node.input[0] == tensor.name:
                return self._convert_embedding(tensor, node)
        self._write(tensor.name, tensor.data_type, self._read(tensor))
        return None

    def _convert_projection(self, tensor: TensorProto, node: onnx.NodeProto) -> None:
        bits, method = self._precision(node.name)
        size = self._option.block_size if node.name != _HEAD else self._edge_block
        # Rows of a MatMul's weight are its inputs; a block is a part of a column.
        weight = self._read(tensor)
        quantized = quantize(weight.T, bits, size, method, self._executor.map)
        del weight
        names = self._write_quantized(tensor.name, bits, quantized)
        inputs, outputs = tensor.dims
        _become(
            node,
            "MatMulNBits",
            [node.input[0], *names],
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=size,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _convert_embedding(self, tensor: TensorProto, node: onnx.NodeProto) -> None:
        bits, size = self._option.edge_bits, self._edge_block
        rows, width = tensor.dims
        if width % size:
            return self._write(tensor.name, tensor.data_type, self._read(tensor))
        weight = self._read(tensor)
        codes, scales, zeros = quantize(weight, bits, size, "round", self._executor.map)
        flat = Quantized(codes.reshape(rows, -1), scales, zeros)
        data, *others = self._write_quantized(tensor.name, bits, flat)
        _become(
            node,
            "GatherBlockQuantized",
            [data, node.input[1], *others],
            bits=bits,
            block_size=size,
            gather_axis=0,
            quantize_axis=1,
        )
        return None

    @property
    def _edge_block(self) -> int:
        return max(32, self._option.block_size)

    def _precision(self, name: str) -> tuple[int, Method]:
        """The bits and the method of a projection."""
        option = self._option
        if name == _HEAD:
            return option.edge_bits, "round"
        layer = _LAYER.fullmatch(name)
        if option.wide_layers and layer and _is_wide(int(layer[1]), self._layers):
            return 8, "round"
        return option.bits, option.method

    def _write_quantized(self, name: str, bits: int, quantized: Quantized) -> list[str]:
        names = [f"{name}_Q{bits}", f"{name}_scales"]
        self._write(names[0], TensorProto.UINT8, quantized.codes)
        self._write(names[1], TensorProto.FLOAT, quantized.scales)
        if quantized.zeros is not None:
            names.append(f"{name}_zero_points")
            self._write(names[2], TensorProto.UINT8, quantized.zeros)
        return names

    def _read(self, tensor: TensorProto) -> npt.NDArray[Any]:
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        stored = {entry.key: entry.value for entry in tensor.external_data}
        return np.fromfile(
            self._base / stored["location"],
            helper.tensor_dtype_to_np_dtype(tensor.data_type),
            count=math.prod(tensor.dims),
            offset=int(stored.get("offset", 0)),
        ).reshape(tensor.dims)

    def _write(self, name: str, kind: int, values: npt.NDArray[Any]) -> None:
        values = np.ascontiguousarray(values)
        digest = hashlib.sha256(values.data).digest()
        # Embedding and head are often the same matrix.
        if (offset := self._written.get(digest)) is None:
            offset = -(-self._data.tell() // _ALIGNMENT) * _ALIGNMENT
            self._written[digest] = offset
            self._data.seek(offset)
            values.tofile(self._data)
        tensor = TensorProto(name=name, data_type=kind, dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        stored = {"location": DATA, "offset": str(offset), "length": str(values.nbytes)}
        for key, value in stored.items():
            tensor.external_data.add(key=key, value=value)
        self._tensors.append(tensor)


def _become(node: onnx.NodeProto, operator: str, inputs: list[str], **attributes: int) -> None:
    """Replaces a node by one of onnxruntime's own operators."""
    node.op_type, node.domain = operator, _DOMAIN
    node.name += f"_Q{attributes['bits']}"
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())


def _is_wide(layer: int, layers: int) -> bool:
    edge = layers / 8
    return layer < edge or layer >= 7 * edge or (layer - round(edge)) % 3 == 2


def quantize_model(base: Path, out: Path, option: Option) -> None:
    """Writes a quantized copy of the model in `base` to the new folder `out`."""
    out.mkdir()
    for file in base.iterdir():
        if file.name not in (GRAPH, DATA):
            shutil.copyfile(file, out / file.name)
    _Quantizer(base, out, option).run()


def _main(base: str, out: str, option: str) -> None:
    quantize_model(Path(base), Path(out), Option(**json.loads(option)))


if __name__ == "__main__":
    sys.exit(command_line.run(lambda: _main(*sys.argv[1:])))

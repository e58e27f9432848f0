"""Makes a graph compute the logits of the last token only."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, helper

_HEAD: Final = "/lm_head/MatMul"
_PREFIX: Final = "/lm_head/prune"


def prune_head(file: Path) -> None:
    """Changes the graph in `file` to what the builder writes with `prune_lm_head`.

    A graph whose head it does not find stays as it is.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    found = [index for index, node in enumerate(graph.node) if node.name.startswith(_HEAD)]
    if not found:
        return
    (index,) = found
    head = graph.node[index]
    last, axis = f"{_PREFIX}/last", f"{_PREFIX}/axis"
    graph.initializer.extend(
        [
            helper.make_tensor(last, TensorProto.INT64, [], [-1]),
            helper.make_tensor(axis, TensorProto.INT64, [1], [1]),
        ]
    )
    gathered, pruned = f"{_PREFIX}/Gather/output_0", f"{_PREFIX}/Unsqueeze/output_0"
    nodes = [
        helper.make_node("Gather", [head.input[0], last], [gathered], f"{_PREFIX}/Gather", axis=1),
        helper.make_node("Unsqueeze", [gathered, axis], [pruned], f"{_PREFIX}/Unsqueeze"),
    ]
    head.input[0] = pruned
    for offset, node in enumerate(nodes):
        graph.node.insert(index + offset, node)
    # The shapes between the nodes are not needed, and some are others now.
    del graph.value_info[:]
    (logits,) = (value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, str(file))

"""An ONNX model on plain onnxruntime, and the attention states of its rows.

Models of onnxruntime-genai's builder add new states to a larger buffer in place, and take the
length of each row from the attention mask (GroupQueryAttention, one of onnxruntime's contrib
operators).
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from llm_sidecar.engines.generation import Logits
from llm_sidecar.errors import ModelUnavailable

_SIZE_STEP: Final = 128
"""Tokens by which memory for states grows."""
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_ERROR: Final = 3
"""onnxruntime's log level that omits warnings."""
_SHRINK_TOKENS: Final = 32
"""After a step of more tokens, the session returns its scratch memory, which is many times that of
a decode step."""
_DTYPES: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class States:
    """Attention states of several rows of different lengths.

    Each array is an anonymous memory mapping. Unused pages take no memory, and the system gets the
    others back when the array is dropped; the C library's heap would keep them.

    Attributes:
        capacity: maximum number of tokens of a row; unbounded, because the arrays grow.
        rows: rows of the arrays.
        size: number of tokens that fit into each row of the arrays.
        arrays: keys and values of each layer, (rows, heads, size, width).
        lengths: tokens of each row.
        handed_over: number of the first tokens of the only row whose states come from torch.
        bindings: of these arrays to the session, by first row and number of rows.
    """

    capacity = sys.maxsize
    rewinds = True

    def __init__(self, model: OrtModel, rows: int, size: int) -> None:
        """Allocates empty rows; `size` is rounded up."""
        self._model = model
        self.rows = rows
        self.size = _rounded(size)
        shape = (rows, model.heads, self.size, model.width)
        self.arrays = [_mapped(shape, model.dtype) for _ in range(model.arrays)]
        self.lengths = [0] * rows
        self.handed_over = 0
        self.bindings: dict[tuple[int, int], Any] = {}

    def rewind(self, length: int) -> None:
        """Keeps the first tokens of the only row."""
        self.lengths = [length]

    def reserve(self, rows: int, size: int) -> None:
        """Grows to at least this many rows and tokens."""
        if rows > self.rows or size > self.size:
            self._resize(max(rows, self.rows), max(size, self.size))

    def fit(self, rows: int, size: int) -> None:
        """Grows to this many rows and tokens, or shrinks if less than half of either is needed.

        The factor of two avoids a copy for every request.
        """
        size = max(size, *self.lengths, 1)
        grows = rows > self.rows or size > self.size
        if grows or 2 * rows < self.rows or 2 * _rounded(size) < self.size:
            self._resize(rows, size)

    def _resize(self, rows: int, size: int) -> None:
        resized = States(self._model, rows, size)
        for row, length in enumerate(self.lengths[:rows]):
            resized.copy(row, self, row, length)
        self.rows, self.size = resized.rows, resized.size
        self.arrays, self.lengths = resized.arrays, resized.lengths
        self.bindings.clear()

    def copy(self, row: int, source: States, source_row: int, length: int) -> None:
        """Replaces a row by the first tokens of another."""
        for array, other in zip(self.arrays, source.arrays, strict=True):
            array[row, :, :length] = other[source_row, :, :length]
        self.lengths[row] = length


def _rounded(size: int) -> int:
    return -(-size // _SIZE_STEP) * _SIZE_STEP


def _mapped(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros in an anonymous mapping."""
    count = math.prod(shape)
    # A mapping has at least one byte.
    size = max(1, count * np.dtype(dtype).itemsize)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, count).reshape(shape)


class OrtModel:
    """The session, and the inputs that it needs.

    Attributes:
        arrays: number of arrays in states, a key's and a value's for each layer.
        heads, width: of each array.
        dtype: of the arrays.
        vocabulary: number of logits of a position.
        only_last: whether the graph computes the logits of the last position only.
    """

    def __init__(
        self, folder: Path, decoder: Mapping[str, Any], threads: int, adapter: Path | None
    ) -> None:
        """Loads `decoder`, as genai_config.json describes it.

        Raises:
            ModelUnavailable: it is not made for a CPU.
            AdapterRejected: the adapter does not fit.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A spinning thread takes a core from the other model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph: Path | bytes = folder / decoder["filename"]
        if adapter is not None:
            graph, matrices = _with_adapter(folder / decoder["filename"], adapter)
            options.add_external_initializers([*matrices], [*matrices.values()])
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
            # Hides the warning that projections without an adapter are not constants.
            options.log_severity_level = _ERROR
        self.session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self._names = [
            (
                decoder["inputs"][f"past_{which}_names"] % layer,
                decoder["outputs"][f"present_{which}_names"] % layer,
            )
            for layer in range(decoder["num_hidden_layers"])
            for which in ("key", "value")
        ]
        inputs = {taken.name: taken for taken in self.session.get_inputs()}
        kind = inputs[self._names[0][0]].type
        if kind not in _DTYPES:
            raise ModelUnavailable(f"its attention states are {kind}, which a CPU does not take")
        self.dtype = _DTYPES[kind]
        self.arrays = len(self._names)
        self.heads, self.width = decoder["num_key_value_heads"], decoder["head_size"]
        self._takes_positions = "position_ids" in inputs
        (logits,) = (taken for taken in self.session.get_outputs() if taken.name == "logits")
        self.vocabulary, self._logits_dtype = logits.shape[-1], _DTYPES[logits.type]
        # The builder's option prune_lm_head, which saves a fifth of the prefill.
        self.only_last = logits.shape[1] == 1
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, ids: npt.NDArray[np.int64], states: States, first: int = 0) -> Logits:
        """Processes tokens of some rows, and adds them to their states.

        Args:
            ids: (rows, tokens).
            first: index of the first of these rows in `states`.

        Returns:
            logits, (rows, positions, vocabulary): of every token, or of the last one only if the
            graph computes no others.
        """
        rows, tokens = ids.shape
        before = np.array(states.lengths[first : first + rows])[:, None]
        after = before + tokens
        mask = np.less(np.arange(after.max()), after).astype(np.int64)
        binding = states.bindings.get((first, rows)) or self._bind(states, first, rows)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        if self._takes_positions:
            binding.bind_cpu_input("position_ids", before + np.arange(tokens))
        positions = 1 if self.only_last else tokens
        logits = np.empty((rows, positions, self.vocabulary), self._logits_dtype)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        shrinks = tokens > _SHRINK_TOKENS
        self.session.run_with_iobinding(binding, self._shrinking if shrinks else None)
        states.lengths[first : first + rows] = after[:, 0].tolist()
        return logits.astype(np.float32, copy=False)

    def _bind(self, states: States, first: int, rows: int) -> Any:
        """Binds some rows of the states. All other inputs change with every run."""
        binding = self.session.io_binding()
        for (past, present), array in zip(self._names, states.arrays, strict=True):
            part = array[first : first + rows]
            # Input and output are the same memory: new states are written behind the others.
            binding.bind_input(past, "cpu", 0, self.dtype, part.shape, part.ctypes.data)
            binding.bind_output(present, "cpu", 0, self.dtype, part.shape, part.ctypes.data)
        states.bindings[first, rows] = binding
        return binding


def _with_adapter(graph: Path, adapter: Path) -> tuple[bytes, dict[str, Any]]:
    """The graph with an adapter's projections, and the matrices for its constants.

    The matrices are constants, because the session packs constants. With inputs, its kernels would
    compute one row and several rows with different rounding.

    Raises:
        AdapterRejected: the adapter does not fit.
    """
    # It takes 30 MB, which most workers do not need.
    from llm_sidecar.engines.lora_graph import read_adapter, read_lora_graph, with_constants

    lora = read_lora_graph(graph)
    matrices = read_adapter(adapter, lora.projections)
    to_value = onnxruntime.OrtValue.ortvalue_from_numpy
    values = {name: to_value(matrix) for name, matrix in matrices.items()}
    return with_constants(lora.serialized, matrices), values

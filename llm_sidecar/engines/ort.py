"""Plain onnxruntime on CPU: rows of different lengths in one forward pass.

It runs models of onnxruntime-genai's builder. Their attention adds new states to a larger buffer in
place, and takes the length of each row from the attention mask (GroupQueryAttention, one of
onnxruntime's contrib operators).
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from llm_sidecar.engines.batch import MAX_ROWS
from llm_sidecar.engines.chat import ChatTokenizer, end_tokens
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.prefixes import Prefix, shared_tokens
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.memory_trim import trim_heap

_LONG_PROMPT: Final = 1024
"""Tokens of a prompt; after longer ones the freed heap is returned to the system."""
_SIZE_STEP: Final = 128
"""Tokens by which memory for states grows."""
_INPUTS: Final = {"input_ids", "attention_mask", "position_ids"}
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_ERROR: Final = 3
"""The level of onnxruntime's log that follows that of warnings."""
_SHRINK_TOKENS: Final = 32
"""After longer steps the session returns its scratch memory, many times that of a decode step."""
_DTYPES: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ARCHITECTURES: Final = {"llama", "mistral", "phi3", "qwen2", "qwen3"}
_LONG_ROPE: Final = b"cos_cache_large"
"""Name of a tensor that the builder writes for rotary embeddings of long context."""


class States:
    """Attention states of several rows of different lengths.

    Each array is an anonymous memory mapping. Unused pages take no memory, and the others
    return to the system as soon as the array is dropped; the C library's heap would keep them.

    Attributes:
        capacity: greatest number of tokens of a row; unbounded, because the arrays grow.
        rows: rows of the arrays.
        size: tokens of each row that fit into the arrays.
        arrays: keys and values of each layer, (rows, heads, size, width).
        lengths: tokens of each row.
        bindings: of these arrays to the session, by first row and number of rows.
    """

    capacity = sys.maxsize
    rewinds = True

    def __init__(self, model: OrtModel, rows: int, size: int) -> None:
        """No tokens in any row; `size` is rounded up."""
        self._model = model
        self.rows = rows
        self.size = _rounded(size)
        shape = (rows, model.heads, self.size, model.width)
        self.arrays = [_mapped(shape, model.dtype) for _ in range(model.arrays)]
        self.lengths = [0] * rows
        self.bindings: dict[tuple[int, int], Any] = {}

    def rewind(self, length: int) -> None:
        """Keeps the first tokens of the only row."""
        self.lengths = [length]

    def reserve(self, rows: int, size: int) -> None:
        """Grows to at least so many rows and tokens."""
        if rows > self.rows or size > self.size:
            self._resize(max(rows, self.rows), max(size, self.size))

    def fit(self, rows: int, size: int) -> None:
        """Grows to so many rows and tokens, and shrinks if less than half of either is needed.

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
    """

    def __init__(
        self, folder: Path, decoder: Mapping[str, Any], threads: int, adapter: Path | None = None
    ) -> None:
        """Loads `decoder`, as genai_config.json describes it.

        Raises:
            ModelUnavailable: it is not made for a CPU.
            AdapterRejected: the adapter does not fit.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A spinning thread would take a core from the other model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph: Path | bytes = folder / decoder["filename"]
        self._adapter: dict[str, Any] = {}
        if adapter is not None:
            # It takes 30 MB, which most workers do not need.
            from llm_sidecar.engines.lora_graph import read_adapter, read_lora_graph

            lora = read_lora_graph(folder / decoder["filename"])
            matrices = read_adapter(adapter, lora.projections)
            to_value = onnxruntime.OrtValue.ortvalue_from_numpy
            self._adapter = {name: to_value(matrix) for name, matrix in matrices.items()}
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
            # It would warn that each matrix is no constant.
            options.log_severity_level = _ERROR
            graph = lora.serialized
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
        self._vocabulary, self._logits_dtype = logits.shape[-1], _DTYPES[logits.type]
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(
        self, ids: npt.NDArray[np.int64], states: States, first: int = 0, keep: int = 1
    ) -> Logits:
        """Processes tokens of some rows, and adds them to their states.

        Args:
            ids: (rows, tokens).
            first: index of the first of these rows in `states`.

        Returns:
            logits of the last positions, (rows, keep, vocabulary).
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
        logits = np.empty((rows, tokens, self._vocabulary), self._logits_dtype)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        shrinks = tokens > _SHRINK_TOKENS
        self.session.run_with_iobinding(binding, self._shrinking if shrinks else None)
        states.lengths[first : first + rows] = after[:, 0].tolist()
        return logits[:, tokens - keep :].astype(np.float32, copy=False)

    def _bind(self, states: States, first: int, rows: int) -> Any:
        """Binds some rows of the states, and the adapter; the rest changes with every run."""
        binding = self.session.io_binding()
        for (past, present), array in zip(self._names, states.arrays, strict=True):
            part = array[first : first + rows]
            # Input and output are the same memory: new states are written behind the others.
            binding.bind_input(past, "cpu", 0, self.dtype, part.shape, part.ctypes.data)
            binding.bind_output(present, "cpu", 0, self.dtype, part.shape, part.ctypes.data)
        for name, matrix in self._adapter.items():
            binding.bind_ortvalue_input(name, matrix)
        states.bindings[first, rows] = binding
        return binding


class OrtRows:
    """Rows side by side in one batch.

    A row that leaves is replaced by the last one, so that no computation goes to an empty row.
    """

    def __init__(self, model: OrtModel) -> None:
        """No rows."""
        self._model = model
        self._numbers: list[int] = []
        self._states = States(model, 0, 0)

    def settle(self, joining: Mapping[int, States], size: int) -> None:
        """Drops the rows that are not among `joining`, and adds those that are new.

        Args:
            joining: states of all rows, by number.
            size: tokens of the longest row with its longest completion.
        """
        states = self._states
        for number in [number for number in self._numbers if number not in joining]:
            row = self._numbers.index(number)
            last = self._numbers.pop()
            if last != number:
                self._numbers[row] = last
                states.copy(row, states, len(self._numbers), states.lengths[len(self._numbers)])
        states.lengths[len(self._numbers) :] = [0] * (states.rows - len(self._numbers))
        # Capacity doubles, so rows that join one by one are copied at most three times.
        rows = next(rows for rows in (2, 4, MAX_ROWS) if rows >= len(joining))
        states.fit(rows, size)
        for number, new in joining.items():
            if number not in self._numbers:
                states.copy(len(self._numbers), new, 0, new.lengths[0])
                self._numbers.append(number)

    def forward(self, pending: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """See `Rows`."""
        for row, number in enumerate(self._numbers):
            # Forced tokens, which the other rows would have to be padded for.
            if forced := pending[number][:-1]:
                self._model.run(np.array([forced], dtype=np.int64), self._states, row, keep=0)
        ids = np.array([pending[number][-1:] for number in self._numbers], dtype=np.int64)
        logits = self._model.run(ids, self._states)
        return dict(zip(self._numbers, logits[:, -1], strict=True))


class OrtEngine(Decoder[States]):
    """A model built by `onnxruntime_genai.models.builder`, on plain onnxruntime."""

    runtime = "onnxruntime"
    batch_capacity = MAX_ROWS

    def __init__(self, folder: Path, *, threads: int = 1, adapter: Path | None = None) -> None:
        """Loads the model.

        Args:
            folder: one that `can_run` accepts.
            threads: of the session.
            adapter: folder with an `adapter.onnx_adapter`, as `models.lora` writes it. A model is a
                little faster without one.

        Raises:
            ModelUnavailable: it is not made for a CPU.
            AdapterRejected: the adapter does not fit.
        """
        config = json.loads((folder / "genai_config.json").read_bytes())["model"]
        self._model = OrtModel(folder, config["decoder"], threads, adapter)
        self.model = self._model.session
        chat = ChatTokenizer.from_folder(folder, end_tokens(config))
        super().__init__(chat, int(config["context_length"]))
        self._in_use: list[Prefix[States]] = []
        if adapter is not None:
            self.check_adapter()

    def new_states(self, capacity: int) -> States:
        """See `Decoder`; memory grows with the tokens."""
        return States(self._model, 1, 0)

    @contextlib.contextmanager
    def borrow(self, prompt: Sequence[int], capacity: int) -> Iterator[Prefix[States]]:
        """See `Decoder`."""
        with self._prefixes.borrow(prompt, capacity) as prefix:
            self._in_use.append(prefix)
            try:
                yield prefix
            finally:
                self._in_use.remove(prefix)
                if len(prompt) > _LONG_PROMPT:
                    trim_heap()

    def process(self, prefix: Prefix[States], generation: Generation) -> Iterator[Logits | None]:
        """See `Decoder`; copies states that another active request shares with this one."""
        prefix.states.fit(1, generation.size)
        prompt = generation.prompt
        length, index = max(
            (shared_tokens(other.tokens, prompt), index) for index, other in enumerate(self._in_use)
        )
        if length > len(prefix.tokens):
            prefix.states.copy(0, self._in_use[index].states, 0, length)
            prefix.tokens = list(prompt[:length])
        yield from super().process(prefix, generation)

    def forward(self, tokens: Sequence[int], states: States, keep: int = 1) -> Logits:
        """See `Decoder`."""
        states.reserve(1, states.lengths[0] + len(tokens))
        return self._model.run(np.array([tokens], dtype=np.int64), states, keep=keep)[0]

    def join(self, states: Mapping[int, States], size: int, former: OrtRows | None) -> OrtRows:
        """See `Decoder`."""
        rows = former or OrtRows(self._model)
        rows.settle(states, size)
        return rows


def can_run(folder: Path) -> bool:
    """Whether this engine can run a model in onnxruntime-genai's format."""
    config = json.loads((folder / "genai_config.json").read_bytes())
    model, decoder = config["model"], config["model"]["decoder"]
    inputs = set(decoder["inputs"])
    return (
        model["type"] in _ARCHITECTURES
        and config["search"].get("past_present_share_buffer", False)
        and inputs <= _INPUTS | {"past_key_names", "past_value_names"}
        and "sliding_window" not in decoder
        and not _has_long_rope(folder / decoder["filename"])
    )


def _has_long_rope(graph: Path) -> bool:
    """Whether a graph switches to other rotary embeddings beyond its original context.

    The longest row decides for all rows of a batch, and the states of what came before the switch
    have to be computed again.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_LONG_ROPE) >= 0

"""Plain onnxruntime, on CPU: several completions in one pass, each as long as it is.

onnxruntime-genai generates one after the other here; its models run without it, too. What its
builder writes takes attention states in buffers with room, adds to them in place, and finds in the
attention mask how long each row is (GroupQueryAttention of onnxruntime's contrib operators).
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from llm_sidecar.engines.base import (
    ANSWER_TOKENS,
    Delta,
    GenerationRequest,
    Message,
    prefill_steps,
    softmax,
)
from llm_sidecar.engines.batches import MOST, Batches, stream_alone
from llm_sidecar.engines.chat import ChatTokenizer, end_tokens
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.prefixes import Kept, Prefixes, shared_prefix
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.memory_trim import trim_heap

_LONG_PROMPT: Final = 1024
"""Tokens of a prompt from which on its scratch memory is returned to the system."""
_SIZE_STEP: Final = 128
"""Tokens by which memory for states grows."""
_INPUTS: Final = {"input_ids", "attention_mask", "position_ids"}
_DTYPES: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ARCHITECTURES: Final = {"llama", "mistral", "qwen2", "qwen3"}
"""Of these no row's positions depend on the others'; a Phi-3 of long context counts all alike."""


class States:
    """Attention states of some rows, each of a length of its own.

    Each array is an anonymous memory mapping. Pages without a token take no memory, and the others
    return to the system as soon as the array is dropped; the C library's heap would keep them.

    Attributes:
        room: greatest number of tokens of a row; unbounded, because the arrays grow.
        rows: rows of the arrays.
        size: tokens of each row that the arrays have space for.
        arrays: keys and values of each layer, (rows, heads, size, width).
        lengths: tokens that each row has.
    """

    room = sys.maxsize
    rewinds = True

    def __init__(self, model: OrtModel, rows: int, size: int) -> None:
        """No tokens in any row; `size` is rounded up."""
        self._model = model
        self.rows = rows
        self.size = _rounded(size)
        shape = (rows, model.heads, self.size, model.width)
        self.arrays = [_mapped(shape, model.dtype) for _ in range(model.arrays)]
        self.lengths = [0] * rows

    def rewind(self, length: int) -> None:
        """Forgets all but the first tokens of the only row."""
        self.lengths = [length]

    def reserve(self, rows: int, size: int) -> None:
        """Grows to at least so many rows and tokens."""
        if rows > self.rows or size > self.size:
            self._resize(max(rows, self.rows), max(size, self.size))

    def fit(self, rows: int, size: int) -> None:
        """Grows to so many rows and tokens, and shrinks where less than half of either is needed.

        The factor of two avoids a copy whenever a request differs from the one before.
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

    def copy(self, row: int, source: States, source_row: int, length: int) -> None:
        """Makes a row of the first tokens of another."""
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
    """The session, and what it has to be given.

    Attributes:
        arrays: of states, a key's and a value's for each layer.
        heads, width: of each of them.
        dtype: of the states.
    """

    def __init__(self, folder: Path, decoder: Mapping[str, Any], threads: int) -> None:
        """Loads `decoder`, as genai_config.json describes it.

        Raises:
            ModelUnavailable: it is not made for a CPU.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # The other model's threads need the cores that these would wait on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            folder / decoder["filename"], options, providers=["CPUExecutionProvider"]
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
        # A long prefill takes many times the scratch memory of a decode step, so it is returned.
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, ids: npt.NDArray[np.int64], states: States, rows: int) -> Any:
        """Reads tokens, which the states of the first `rows` take in.

        Args:
            ids: (rows, tokens).

        Returns:
            logits, an onnxruntime value (rows, tokens, vocabulary).
        """
        tokens = ids.shape[1]
        before = np.array(states.lengths[:rows])[:, None]
        mask = (np.arange(before.max() + tokens) < before + tokens).astype(np.int64)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        positions = before + np.arange(tokens)
        if self._takes_positions:
            binding.bind_cpu_input("position_ids", positions)
        for (past, present), array in zip(self._names, states.arrays, strict=True):
            shape = (rows, *array.shape[1:])
            # The same memory: what is new is written behind what is there.
            binding.bind_input(past, "cpu", 0, self.dtype, shape, array.ctypes.data)
            binding.bind_output(present, "cpu", 0, self.dtype, shape, array.ctypes.data)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding, self._shrinking if tokens > 1 else None)
        states.lengths[:rows] = [length + tokens for length in states.lengths[:rows]]
        return binding.get_outputs()[-1]


class OrtRows:
    """Rows side by side in one batch.

    A row that leaves is replaced by the last one, so that no computation goes to an empty row.
    """

    def __init__(self, model: OrtModel) -> None:
        """No rows."""
        self._model = model
        self._numbers: list[int] = []
        self._states = States(model, 0, 0)

    def settle(self, caches: Mapping[int, States], size: int) -> None:
        """Drops the rows that are not among `caches`, and adds those that are new.

        Args:
            caches: of all rows, by number.
            size: tokens of the longest row, its completion included.
        """
        states = self._states
        for number in [number for number in self._numbers if number not in caches]:
            row = self._numbers.index(number)
            last = self._numbers.pop()
            if last != number:
                self._numbers[row] = last
                states.copy(row, states, len(self._numbers), states.lengths[len(self._numbers)])
        states.lengths[len(self._numbers) :] = [0] * (states.rows - len(self._numbers))
        # Capacity doubles, so rows that join one by one are copied at most three times.
        rows = next(rows for rows in (2, 4, MOST) if rows >= len(caches))
        states.fit(rows, size)
        for number, cache in caches.items():
            if number not in self._numbers:
                states.copy(len(self._numbers), cache, 0, cache.lengths[0])
                self._numbers.append(number)

    def forward(self, pending: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """See `Rows`; each row has one token pending."""
        ids = np.array([pending[number] for number in self._numbers], dtype=np.int64)
        logits = self._model.run(ids, self._states, len(ids)).numpy()
        return dict(zip(self._numbers, logits[:, -1].astype(np.float32, copy=False), strict=True))


class OrtEngine:
    """A model built by `onnxruntime_genai.models.builder`, for completions without guidance."""

    runtime = "onnxruntime"
    device = "cpu"
    most_together = MOST

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        """Loads the model.

        Args:
            folder: one that `runs_here` says yes of.
            threads: of the session.

        Raises:
            ModelUnavailable: it is not made for a CPU.
        """
        written = json.loads((folder / "genai_config.json").read_bytes())["model"]
        self.context_length = int(written["context_length"])
        self.model = OrtModel(folder, written["decoder"], threads)
        self._chat = ChatTokenizer.from_folder(folder, end_tokens(written))
        self.tokenizer = self._chat.tokenizer
        self._prefixes: Prefixes[None, States] = Prefixes(
            lambda kind, room: States(self.model, 1, 0)
        )
        self._in_use: list[Kept[States]] = []

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        return self._chat.prompt(request, self.context_length, header)

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        return stream_alone(self, request)

    def together(self) -> Batches[States]:
        return Batches(self)

    def begin(self, request: GenerationRequest) -> Generation:
        """See `BatchingEngine`."""
        if request.guidance is not None:
            raise ValueError("this engine writes without guidance")
        prompt = self.tokenize(request)
        return Generation(request, prompt, decode=self._chat.decoder(), ends=self._chat.ends)

    @contextlib.contextmanager
    def borrowed(self, generation: Generation) -> Iterator[Kept[States]]:
        """See `BatchingEngine`."""
        # The last token is read when the first is to be written, and no other one alone.
        with self._prefixes.borrowed(None, generation.prompt[:-1], 0) as kept:
            self._in_use.append(kept)
            try:
                yield kept
            finally:
                self._in_use.remove(kept)
                if len(generation.prompt) > _LONG_PROMPT:
                    trim_heap()

    def reading(self, generation: Generation, kept: Kept[States]) -> Iterator[None]:
        """See `BatchingEngine`."""
        prompt = generation.prompt[:-1]
        kept.cache.fit(1, len(generation.prompt) + generation.limit)
        self._take_over(kept, prompt)
        generation.cached = len(kept.tokens)
        yield from self._read(kept, prompt)

    def _take_over(self, kept: Kept[States], prompt: Sequence[int]) -> None:
        """Copies what one that is under way has read of the same beginning."""
        length, index = max(
            (shared_prefix(other.tokens, prompt), index) for index, other in enumerate(self._in_use)
        )
        if length > len(kept.tokens):
            kept.cache.copy(0, self._in_use[index].cache, 0, length)
            kept.tokens = list(prompt[:length])

    def _read(self, kept: Kept[States], prompt: Sequence[int]) -> Iterator[None]:
        """Reads what is left of a prompt in steps, after each of which it can be cancelled."""
        for start, stop in prefill_steps(len(kept.tokens), len(prompt)):
            self._run(prompt[start:stop], kept.cache)
            kept.tokens += prompt[start:stop]
            yield

    def forward(self, tokens: Sequence[int], cache: States, keep: int = 1) -> Logits:
        """See `BatchingEngine`."""
        logits: Logits = self._run(tokens, cache).numpy()[0, -keep:]
        return logits.astype(np.float32, copy=False)

    def joined(self, caches: Mapping[int, States], size: int, former: OrtRows | None) -> OrtRows:
        """See `BatchingEngine`."""
        rows = former or OrtRows(self.model)
        rows.settle(caches, size)
        return rows

    def prepare(self, request: GenerationRequest) -> Generator[None]:
        prompt = self.tokenize(request, header=False)
        with self._prefixes.borrowed(None, (), 0) as kept:
            yield from self._read(kept, prompt)

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        with self._prefixes.borrowed(None, prompt, 0) as kept:
            return prompt, softmax(self._last(kept, prompt)[-1])

    def answer_probabilities(
        self,
        messages: Sequence[Message],
        answers: Sequence[str],
        tokens: Sequence[int] | None = None,
    ) -> dict[str, float]:
        prompt = self.tokenize(GenerationRequest(messages, ANSWER_TOKENS, tokens=tokens))
        tree = self._chat.answer_tree(tuple(answers))
        branch = [] if tree.branch is None else [tree.branch]
        # The one that a critique has just been written with, as a rule.
        with self._prefixes.borrowed(None, prompt, 0) as kept:
            logits = self._last(kept, prompt, branch)
        return tree.read(logits[0], logits[1] if branch else None)

    def _last(
        self, kept: Kept[States], prompt: Sequence[int], branch: Sequence[int] = ()
    ) -> Logits:
        """Logits after the prompt and after each token of `branch`, read in the same pass."""
        *before, (start, stop) = prefill_steps(len(kept.tokens), len(prompt))
        for step in before:
            self._run(prompt[slice(*step)], kept.cache)
        tokens = [*prompt[start:stop], *branch]
        logits = self.forward(tokens, kept.cache, keep=1 + len(branch))
        kept.tokens = list(prompt)
        return logits

    def _run(self, tokens: Sequence[int], states: States) -> Any:
        states.reserve(1, states.lengths[0] + len(tokens))
        return self.model.run(np.array([tokens], dtype=np.int64), states, 1)


def runs_here(folder: Path) -> bool:
    """Whether a model in onnxruntime-genai's format is one that this engine knows how to run."""
    written = json.loads((folder / "genai_config.json").read_bytes())
    model, decoder = written["model"], written["model"]["decoder"]
    inputs = set(decoder["inputs"])
    return (
        model["type"] in _ARCHITECTURES
        and written["search"].get("past_present_share_buffer", False)
        and inputs <= _INPUTS | {"past_key_names", "past_value_names"}
        and "sliding_window" not in decoder
    )

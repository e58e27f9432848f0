"""Plain onnxruntime on CPU: rows of different lengths in one forward pass.

It runs models of onnxruntime-genai's builder.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llm_sidecar.engines.base import PROBE, GenerationRequest
from llm_sidecar.engines.batch import MAX_ROWS
from llm_sidecar.engines.chat import ChatTokenizer, end_tokens
from llm_sidecar.engines.context import PREFILL_CHUNK, prefill_steps
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.ort_model import OrtModel, States
from llm_sidecar.engines.prefixes import UNSHARED, Prefix, shared_tokens
from llm_sidecar.memory_trim import trim_heap

if TYPE_CHECKING:
    from llm_sidecar.engines.torch_prefill import TorchPrefill

_LONG_PROMPT: Final = 1024
"""Prompt tokens; after a longer prompt, the freed heap is returned to the system."""
_INPUTS: Final = {"input_ids", "attention_mask", "position_ids"}
_PAST: Final = {"past_key_names", "past_value_names"}
_PRESENT: Final = {"present_key_names", "present_value_names"}
_SHAPE: Final = {"head_size", "num_hidden_layers", "num_key_value_heads"}
_ARCHITECTURES: Final = {"llama", "mistral", "phi3", "qwen2", "qwen3"}
_SAME_MODEL: Final = 0.9
"""Least cosine between the states of two precisions of one model: 0.97 for int4, about 0 for
unrelated models."""
_LONG_ROPE: Final = b"cos_cache_large"
"""Name of a tensor that the builder writes for rotary embeddings of long context."""


class OrtRows:
    """The rows of one batch, in shared arrays.

    The last row replaces one that leaves, so that no forward pass computes an empty row.
    """

    def __init__(self, model: OrtModel) -> None:
        """Starts without rows."""
        self._model = model
        self._numbers: list[int] = []
        self._states = States(model, 0, 0)

    def settle(self, joining: Mapping[int, States], size: int) -> None:
        """Drops the rows that are not in `joining`, and adds the new ones.

        Args:
            joining: states of all rows, by number.
            size: maximum number of prompt and completion tokens of a row.
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
        """See `Rows`.

        Each row gets the same logits as alone, bit for bit, so that a proposal can be generated
        again. Kernels differ numerically between one token and several, but not with the number of
        rows.
        """
        several = {row for row, number in enumerate(self._numbers) if len(pending[number]) > 1}
        found: dict[int, Logits] = {}
        if len(several) < len(self._numbers):
            ids = np.array([pending[number][:1] for number in self._numbers], dtype=np.int64)
            found = dict(zip(self._numbers, self._model.run(ids, self._states)[:, -1], strict=True))
            # The pass has to include every row. Rows with several tokens run again below.
            for row in several:
                self._states.lengths[row] -= 1
        for row in several:
            number = self._numbers[row]
            forced = np.array([pending[number]], dtype=np.int64)
            found[number] = self._model.run(forced, self._states, row)[0, -1]
        return found


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
        context, window = int(config["context_length"]), _window(config["decoder"])
        super().__init__(chat, min(context, window or context))
        if self.context_length < context:
            self.notes += (
                f"the context is cut from {context} to {window} tokens, the sliding window",
            )
        self._in_use: list[Prefix[States]] = []
        self._prefill: TorchPrefill | None = None
        if adapter is not None:
            self.check_adapter()

    def new_states(self, capacity: int) -> States:
        """See `Decoder`; memory grows with the tokens."""
        return States(self._model, 1, 0)

    @contextlib.contextmanager
    def borrow(self, prompt: Sequence[int], capacity: int) -> Iterator[Prefix[States]]:
        """See `Decoder`."""
        with self._prefixes.borrow(prompt, capacity) as prefix:
            if self._prefill is not None:
                self._cut(prefix, self._reusable(prefix, prompt))
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
            (self._reusable(other, prompt), index) for index, other in enumerate(self._in_use)
        )
        if length > len(prefix.tokens):
            prefix.states.copy(0, self._in_use[index].states, 0, length)
            prefix.tokens = list(prompt[:length])
            self._cut(prefix, length)
        yield from super().process(prefix, generation)

    def forward(self, tokens: Sequence[int], states: States) -> Logits:
        """See `Decoder`."""
        states.reserve(1, states.lengths[0] + len(tokens))
        logits: Logits = self._model.run(np.array([tokens], dtype=np.int64), states)[0, -1]
        return logits

    def all_logits(self, prompt: Sequence[int], states: States) -> Iterator[Logits]:
        """See `Decoder`. It never uses torch for this prefill, which returns no logits."""
        states.reserve(1, len(prompt))
        if self._model.only_last:
            yield from super().all_logits(prompt, states)
            return
        for start, stop in prefill_steps(0, len(prompt)):
            yield self._model.run(np.array([prompt[start:stop]], dtype=np.int64), states)[0]

    def hand_over(self, prefill: TorchPrefill, folder: Path) -> str | None:
        """Lets torch do the prefill from now on; returns the reason if the models differ."""
        model = self._model
        shape = (model.arrays // 2, model.heads, model.width, model.vocabulary)
        if prefill.shape != shape or model.dtype != np.float32:
            return "it is a model of another shape"
        tokens = self.tokenize(GenerationRequest(PROBE, 1))
        ours, theirs = (States(model, 1, len(tokens)) for _ in range(2))
        self.forward(tokens, ours)
        for _ in prefill.run(tokens, theirs.arrays):
            pass
        # Also false for NaN.
        if not _similarity(ours, theirs, len(tokens)) >= _SAME_MODEL:
            return "it is a model with other weights"
        self._prefill, self.prefill_folder, self.dtype = prefill, folder, "bfloat16"
        return None

    def _process(self, prefix: Prefix[States], prompt: Sequence[int]) -> Iterator[Logits | None]:
        """See `Decoder`; onnxruntime always processes the last tokens, for its own logits."""
        if self._prefill is not None:
            yield from self._prefill_on_torch(self._prefill, prefix, prompt[:-UNSHARED])
        yield from super()._process(prefix, prompt)

    def _prefill_on_torch(
        self, prefill: TorchPrefill, prefix: Prefix[States], tokens: Sequence[int]
    ) -> Iterator[None]:
        states = prefix.states
        states.reserve(1, len(tokens))
        for length in prefill.run(tokens, states.arrays, len(prefix.tokens)):
            prefix.tokens = list(tokens[:length])
            states.lengths, states.handed_over = [length], length
            yield None

    def _reusable(self, prefix: Prefix[States], prompt: Sequence[int]) -> int:
        """The number of tokens whose states `prompt` can reuse.

        With prefill on torch, these are whole blocks, or all that torch processes of the prompt.
        """
        length = max(0, shared_tokens(prefix.tokens, prompt))
        if self._prefill is None:
            return length
        read = prefix.states.handed_over
        if length == read == len(prompt) - UNSHARED:
            return length
        length = min(length, read)
        return length - length % PREFILL_CHUNK

    def _cut(self, prefix: Prefix[States], length: int) -> None:
        prefix.states.rewind(length)
        prefix.states.handed_over = length
        del prefix.tokens[length:]

    def join(self, states: Mapping[int, States], size: int, former: OrtRows | None) -> OrtRows:
        """See `Decoder`."""
        rows = former or OrtRows(self._model)
        rows.settle(states, size)
        return rows


def _similarity(one: States, other: States, length: int) -> float:
    """The cosine similarity of the first states of two rows: the median of all arrays."""
    pairs = [
        (mine[0, :, :length].ravel(), theirs[0, :, :length].ravel())
        for mine, theirs in zip(one.arrays, other.arrays, strict=True)
    ]
    return float(np.median([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]))


def can_run(folder: Path) -> bool:
    """Whether this engine can run a model in onnxruntime-genai's format.

    It needs a complete genai_config.json. onnxruntime-genai has defaults for most of it, and
    reports what it does not understand.
    """
    try:
        config = json.loads((folder / "genai_config.json").read_bytes())
        model, decoder = config["model"], config["model"]["decoder"]
        inputs = set(decoder["inputs"])
        return (
            model["type"] in _ARCHITECTURES
            and model["context_length"] > 0
            and decoder.keys() >= _SHAPE
            and inputs >= _PAST
            and inputs <= _INPUTS | _PAST
            and decoder["outputs"].keys() >= _PRESENT
            and config["search"].get("past_present_share_buffer", False)
            and _window(decoder) is not None
            and not _has_long_rope(folder / decoder["filename"])
        )
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        return False


def _window(decoder: Mapping[str, Any]) -> int | None:
    """The number of tokens in a sliding window; 0 if there is no window.

    Beyond the window the graph expects that its oldest states are dropped, which this engine cannot
    do. None if the runtime has to move the states within the window too.
    """
    sliding = decoder.get("sliding_window")
    if sliding is None:
        return 0
    if sliding.get("slide_key_value_cache", True) or sliding.get("slide_inputs", True):
        return None
    return int(sliding["window_size"])


def _has_long_rope(graph: Path) -> bool:
    """Whether a graph switches to other rotary embeddings beyond its original context.

    In a batch the longest row would switch all rows, and all earlier states would have to be
    computed again.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_LONG_ROPE) >= 0

"""The decoding that all engines share: chats, prefixes, batches, guidance and scores.

An engine for a runtime adds attention states and forward passes:

    class MyEngine(Decoder[MyStates]):
        def new_states(self, capacity): ...
        def forward(self, tokens, states): ...
        def join(self, states, size, former): ...  # only if it batches
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import (
    ANSWER_TOKENS,
    PROBE,
    Delta,
    GenerationRequest,
    Message,
    Sampling,
    prefill_steps,
    softmax,
    steps_alone,
)
from llm_sidecar.engines.batch import ContinuousBatch, Rows
from llm_sidecar.engines.chat import ChatTokenizer
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.guidance import Grammars
from llm_sidecar.engines.prefixes import Prefix, PrefixCache, S
from llm_sidecar.engines.sampling import sampling_of
from llm_sidecar.errors import AdapterRejected


class Decoder(abc.ABC, Generic[S]):
    """An `Engine` on any runtime.

    Attributes:
        batch_capacity: maximum number of requests in a batch.
        sampling: the model's own, for requests without a temperature; `load_engine` sets it.
        model: the runtime's own.
        notes, scores_in_parallel, versions: see `Engine`.
        tokenizer: of the `tokenizers` package, or of transformers if it runs the model.
    """

    runtime: str
    device: str = "cpu"
    dtype: str | None = None
    prefill_folder: Path | None = None
    batch_capacity: int = 1
    scores_in_parallel: bool = False
    versions: Mapping[str, str] = MappingProxyType({})
    sampling: Sampling = Sampling()
    model: Any

    def __init__(self, chat: ChatTokenizer, context_length: int) -> None:
        """Starts without any states.

        Args:
            chat: the model's.
            context_length: maximum number of prompt and completion tokens of a request.
        """
        self.context_length = context_length
        self.notes = chat.notes
        self.tokenizer: Any = chat.tokenizer
        self._chat = chat
        self._grammars = Grammars(chat.tokenizer, chat.ends)
        self._prefixes: PrefixCache[S] = PrefixCache(self.new_states)

    # To be implemented for each runtime

    @abc.abstractmethod
    def new_states(self, capacity: int) -> S:
        """Empty states of one row with at least this capacity, in tokens."""

    @abc.abstractmethod
    def forward(self, tokens: Sequence[int], states: S) -> Logits:
        """Processes tokens and adds them to the states of one row.

        Returns:
            logits after the last token, (vocabulary,). A graph with a pruned head has no others.
        """

    def join(self, states: Mapping[int, S], size: int, former: Any) -> Rows:
        """Joins rows into one batch; a runtime that batches more than one row overrides this.

        Args:
            states: of all rows, by number, from before they joined a batch.
            size: maximum number of prompt and completion tokens of a row.
            former: the previous result of this method, or None. Its states move to the new rows,
                and it must not be used afterwards.
        """
        raise NotImplementedError

    def borrow(
        self, prompt: Sequence[int], capacity: int
    ) -> contextlib.AbstractContextManager[Prefix[S]]:
        """See `PrefixCache.borrow`."""
        return self._prefixes.borrow(prompt, capacity)

    # Shared by all runtimes; `Engine` has the docstrings

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        return self._chat.prompt(request, self.context_length, header)

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        with contextlib.closing(steps_alone(self.batch(), request)) as steps:
            for deltas in steps:
                yield from deltas

    def batch(self) -> ContinuousBatch[S]:
        return ContinuousBatch(self)

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        prompt = self.tokenize(request, header=False)
        # Prefilled beside the old prefix, which requests use until this one is complete.
        with self.borrow((), len(prompt) + request.max_tokens) as prefix:
            for _ in self._process(prefix, prompt):
                yield

    def decode_steps(self, count: int) -> Generator[None]:
        states = self.new_states(2 + count)
        # The first forward pass may read the weights from the disk.
        self.forward([0, 0], states)
        yield
        for _ in range(count):
            self.forward([0], states)
            yield

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        return prompt, softmax(self._logits_after(prompt)[0])

    def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        tokens: Sequence[int] | None = None,
    ) -> dict[str, float]:
        prompt = self.tokenize(GenerationRequest(messages, ANSWER_TOKENS, tokens=tokens))
        tree = self._chat.choice_tree(messages, prompt, tuple(choices))
        kept = prompt[: len(prompt) - tree.replaced]
        return tree.read([self._logits_after(kept, path) for path in tree.paths])

    # Called by `ContinuousBatch`

    def start(self, request: GenerationRequest) -> Generation:
        """Starts a completion without tokens.

        Raises:
            InvalidRequest, ModelUnavailable: as in `Engine.tokenize`.
        """
        return Generation(
            request,
            self.tokenize(request),
            decode=self._chat.decoder(),
            ends=self._chat.ends,
            sampling=sampling_of(request, self.sampling),
            matcher=None if request.guidance is None else self._grammars.matcher(request.guidance),
        )

    def process(self, prefix: Prefix[S], generation: Generation) -> Iterator[Logits | None]:
        """Processes the rest of a prompt; it can be cancelled after each step.

        Yields:
            None after each step but the last; then the logits after the prompt, (vocabulary,).
        """
        generation.cached = len(prefix.tokens)
        yield from self._process(prefix, generation.prompt)

    def check_adapter(self) -> None:
        """Raises AdapterRejected unless the model's probabilities are finite with its adapter."""
        _, probabilities = self.next_token(PROBE)
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model's probabilities are not finite numbers")

    def _logits_after(self, prompt: Sequence[int], more: Sequence[int] = ()) -> Logits:
        """Logits after the prompt and after each of `more`, (1 + tokens of `more`, vocabulary)."""
        with self.borrow(prompt, len(prompt) + len(more)) as prefix:
            *_, first = self._process(prefix, prompt)
            return np.array([first, *(self.forward([token], prefix.states) for token in more)])

    def _process(self, prefix: Prefix[S], prompt: Sequence[int]) -> Iterator[Logits | None]:
        for start, stop in prefill_steps(len(prefix.tokens), len(prompt)):
            logits = self.forward(prompt[start:stop], prefix.states)
            prefix.tokens += prompt[start:stop]
            yield logits if stop == len(prompt) else None

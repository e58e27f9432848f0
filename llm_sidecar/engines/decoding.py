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
    PROBE,
    ChoiceScores,
    Delta,
    GenerationRequest,
    Message,
    Question,
    Sampling,
    result_of,
    softmax,
    steps_alone,
)
from llm_sidecar.engines.batch import ContinuousBatch, Rows
from llm_sidecar.engines.chat import ChatTokenizer
from llm_sidecar.engines.context import prefill_steps
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.guidance import Grammars
from llm_sidecar.engines.logprobs import check_prompt_logprobs
from llm_sidecar.engines.prefixes import Prefix, PrefixCache, S
from llm_sidecar.engines.questions import Asked, Batches, Found, Read, plan_batches, scores_of
from llm_sidecar.engines.sampling import sampling_of
from llm_sidecar.engines.token_bytes import TokenBytes
from llm_sidecar.errors import AdapterRejected


class Decoder(abc.ABC, Generic[S]):
    """An `Engine` on any runtime.

    Attributes:
        batch_capacity: maximum number of requests in a batch.
        batches_prompts: whether a forward pass takes several tokens of more than one row.
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
    batches_prompts: bool = False
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
        self._data = TokenBytes(chat.tokenizer)
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

    def all_logits(self, prompt: Sequence[int], states: S) -> Iterator[Logits]:
        """Processes a whole prompt, step by step.

        This implementation is for runtimes that return only the last logits. It processes the token
        before again, to avoid one-token chunks: kernels differ numerically for length 1.

        Args:
            states: new and empty.

        Yields:
            logits after each token of the step, (tokens, vocabulary).
        """
        yield self.forward(prompt[:1], states)[None]
        for position in range(1, len(prompt)):
            states.rewind(position - 1)
            yield self.forward(prompt[position - 1 : position + 1], states)[None]

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
        tokens = self._chat.prompt(request, self.context_length, header)
        if request.prompt_logprobs is not None:
            check_prompt_logprobs(len(tokens), request.prompt_logprobs)
        if request.guidance is not None:
            self._grammars.check(request.guidance)
        return tokens

    def text_of(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._data, tokens)).decode(errors="replace")

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

    def score_questions(
        self, questions: Sequence[Question]
    ) -> Generator[None, None, list[ChoiceScores]]:
        asked = [self._ask(question) for question in questions]
        reads = [read for one in asked for read in one.reads()]
        batches = None
        if self.batches_prompts and len(reads) > 1:
            batches = plan_batches(reads, self.batch_capacity, self.context_length)
        results = self._one_by_one(reads) if batches is None else self._batched(reads, batches)
        with contextlib.closing(results):
            return (yield from scores_of(asked, results))

    def score_choices(
        self, messages: Sequence[Message], choices: Sequence[str]
    ) -> dict[str, float]:
        (scores,) = result_of(self.score_questions([Question(messages, choices)]))
        return dict(scores.probabilities)

    # Called by `ContinuousBatch`

    def start(self, request: GenerationRequest) -> Generation:
        """Starts a completion without tokens.

        Raises:
            InvalidRequest, ModelUnavailable: as in `Engine.tokenize`.
        """
        prompt = self.tokenize(request)
        return Generation(
            request,
            prompt,
            decode=self._chat.decoder(request, prompt),
            data=self._data,
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

    def process_all(self, states: S, generation: Generation) -> Iterator[Logits | None]:
        """Like `process`, from empty states, but with the log probabilities of the prompt."""
        done = 0
        for logits in self.all_logits(generation.prompt, states):
            generation.read(done, logits)
            done += len(logits)
            yield logits[-1] if done == len(generation.prompt) else None

    def check_adapter(self) -> None:
        """Raises AdapterRejected unless the model's probabilities are finite with its adapter."""
        _, probabilities = self.next_token(PROBE)
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model's probabilities are not finite numbers")

    def _ask(self, question: Question) -> Asked:
        prompt = self.tokenize(question.request)
        tree = self._chat.choice_tree(question.messages, prompt, tuple(question.choices))
        return Asked(prompt, tree)

    def _logits_after(self, prompt: list[int]) -> Logits:
        """Logits after the prompt, (1, vocabulary)."""
        *_, found = self._one_by_one([Read(prompt, ())])
        assert found is not None
        return found.logits

    def _one_by_one(self, reads: Sequence[Read]) -> Generator[Found | None]:
        """See `scores_of`: a forward pass for each read.

        No step comes between the return of a prefix to the cache and its next use, so no other
        request can take it.
        """
        for prompt, path in reads:
            with self.borrow(prompt, len(prompt) + len(path)) as prefix:
                cached = len(prefix.tokens)
                rows: list[Logits] = []
                for logits in self._process(prefix, prompt):
                    if logits is None:
                        yield None
                    else:
                        rows.append(logits)
                rows += [self.forward([token], prefix.states) for token in path]
                yield Found(np.array(rows), cached)

    def _batched(self, reads: Sequence[Read], batches: Batches) -> Generator[Found | None]:
        """See `scores_of`: a forward pass for several reads."""
        prefix, size, rows = batches
        with self.borrow(prefix, size) as kept:
            cached = len(kept.tokens)
            for _ in self._process(kept, prefix):
                yield None
            for start in range(0, len(reads), rows):
                group = dict(enumerate(reads[start : start + rows], start))
                joined = self.join(dict.fromkeys(group, kept.states), size, None)
                logits = _forward(joined, len(prefix), group)
                for number in group:
                    yield Found(np.array(logits[number]), len(prefix) if number else cached)
                yield None

    def _process(self, prefix: Prefix[S], prompt: Sequence[int]) -> Iterator[Logits | None]:
        for start, stop in prefill_steps(len(prefix.tokens), len(prompt)):
            logits = self.forward(prompt[start:stop], prefix.states)
            prefix.tokens += prompt[start:stop]
            yield logits if stop == len(prompt) else None


def _forward(rows: Rows, shared: int, reads: Mapping[int, Read]) -> dict[int, list[Logits]]:
    """The logits of reads whose first `shared` tokens are in the states of the rows."""
    steps = [rows.forward({number: read.prompt[shared:] for number, read in reads.items()})]
    for length in range(max(len(read.path) for read in reads.values())):
        # A row whose path has ended gets a dummy token; its logits are dropped.
        steps.append(
            rows.forward({number: [*read.path[length:], 0][:1] for number, read in reads.items()})
        )
    return {
        number: [logits[number] for logits in steps[: 1 + len(read.path)]]
        for number, read in reads.items()
    }

"""GGUF models: llama.cpp computes, in a server process of its own.

llama.cpp batches its requests itself. So a batch here is a set of streamed answers, each read by a
thread. Prompts are rendered and encoded as for all engines and sent as tokens.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.answer_check import check_schema
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
from llm_sidecar.engines.chat import ChatTokenizer
from llm_sidecar.engines.choice_tree import ChoiceTree
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.gguf_model import GgufModel, Token, check_adapter, read_model
from llm_sidecar.engines.gguf_tokenizer import GgufTokenizer
from llm_sidecar.engines.llama_batch import LlamaBatch
from llm_sidecar.engines.llama_capacity import Capacity
from llm_sidecar.engines.llama_completion import LlamaCompletion
from llm_sidecar.engines.llama_connection import Connection
from llm_sidecar.engines.llama_probabilities import Probabilities
from llm_sidecar.engines.llama_server import LlamaServer, Options, find_program
from llm_sidecar.engines.logprobs import check_prompt_logprobs
from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.free_memory import free_memory

SLOTS: Final = 4
"""Requests that are generated at the same time."""
_WAIT_SECONDS: Final = 0.25
"""How long a step of a score waits for its turn; it can be cancelled between two steps."""
_CACHE_MIB: Final = 256
"""Memory for the states of earlier prompts beside those in the slots, in MiB."""
_SHARE_OF_MEMORY: Final = 8
"""The states of all prompts take an eighth of the memory that the weights leave free."""
_LEAST_CONTEXT: Final = 4096
_MOST_CONTEXT: Final = 16_384
_CONTEXT_STEP: Final = 256
"""llama.cpp rounds a context up to a multiple of this."""


class LlamaCppEngine:
    """See the module's docstring, and `Engine`."""

    runtime = "llama.cpp"
    scores_in_parallel = True
    dtype: str | None = None
    prefill_folder: Path | None = None
    sampling = Sampling()

    def __init__(
        self,
        file: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        adapter: Path | None = None,
        program: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            file: the .gguf file, or the first of a split model.
            device: `auto` uses a GPU if llama.cpp finds one.
            threads: of the computation, on CPU.
            adapter: folder that holds one adapter as a .gguf file.
            program: a llama-server; None for the one on the PATH, else the wheel.

        Raises:
            ModelUnavailable: the model cannot be served; says why.
            AdapterRejected: the adapter does not fit, or its folder holds none.
        """
        found = find_program(program)
        model = read_model(file)
        self.context_length, self.notes = context_of(model)
        self.capacity = Capacity(SLOTS, self.context_length)
        self._vocabulary = model.vocabulary
        self.server = LlamaServer.start(
            Options(
                model=str(file),
                context=self.context_length,
                slots=SLOTS,
                threads=threads,
                batch=PREFILL_CHUNK,
                cache_mib=_CACHE_MIB,
                layers_on_gpu={"cpu": 0, "cuda": 999}.get(device),
                adapter=None if adapter is None else str(_adapter_file(adapter, model)),
            ),
            found,
        )
        try:
            self.device = "cuda" if self.server.on_gpu else "cpu"
            if device == "cuda" and not self.server.on_gpu:
                raise ModelUnavailable("DEVICE=cuda, but this llama.cpp has no GPU that it can use")
            self.versions = self._versions(found)
            self._read_tokenizer(model)
            if adapter is not None:
                self._check_adapter()
        except BaseException:
            self.server.close()
            raise

    def _read_tokenizer(self, model: GgufModel) -> None:
        self._chat = self._chat_tokenizer(model)
        self.notes += self._chat.notes
        self.probabilities = Probabilities(
            self._vocabulary,
            self._chat.tokenizer.get_added_tokens_decoder(),
            self._encode("0")[-1],
        )

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        tokens = self._chat.prompt(request, self.context_length, header)
        if request.prompt_logprobs is not None:
            check_prompt_logprobs(len(tokens), request.prompt_logprobs)
        if request.guidance is not None:
            check_schema(request.guidance)
        return tokens

    def text_of(self, tokens: Sequence[int]) -> str:
        text: str = self.server.post("/detokenize", {"tokens": list(tokens)})["content"]
        return text

    def batch(self) -> LlamaBatch:
        return LlamaBatch(self, SLOTS)

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        with contextlib.closing(steps_alone(self.batch(), request)) as steps:
            for deltas in steps:
                yield from deltas

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        tokens = self.tokenize(request, header=False)
        # Without a token to generate, llama.cpp processes the prompt and keeps its states.
        request = GenerationRequest([], 0, tokens=tokens)
        with contextlib.closing(steps_alone(self.batch(), request)) as steps:
            for _ in steps:
                yield

    def decode_steps(self, count: int) -> Generator[None]:
        request = GenerationRequest([], 1 + count)
        completion = LlamaCompletion(self, request, [0, 0], ignore_end=True)
        with self.server.watching(completion.connection):
            done = 0
            for delta in completion.deltas():
                # One delta carries a character of several tokens.
                while done < delta.completion_tokens:
                    done += 1
                    yield

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        with self.server.watching(self.server.connect()) as connection:
            found = self.probabilities.distribution(connection, prompt)
        return prompt, softmax(found[:-1])

    def score_questions(
        self, questions: Sequence[Question]
    ) -> Generator[None, None, list[ChoiceScores]]:
        # llama.cpp caches the common prefix of the prompts.
        scores: list[ChoiceScores] = []
        for question in questions:
            scores.append((yield from self._score(question)))
        return scores

    def score_choices(
        self, messages: Sequence[Message], choices: Sequence[str]
    ) -> dict[str, float]:
        (scores,) = result_of(self.score_questions([Question(messages, choices)]))
        return dict(scores.probabilities)

    def _score(self, question: Question) -> Generator[None, None, ChoiceScores]:
        prompt = self.tokenize(question.request)
        tree = self._chat.choice_tree(question.messages, prompt, tuple(question.choices))
        kept = prompt[: len(prompt) - tree.replaced]
        longest = len(kept) + max(map(len, tree.tails.values()))
        reservation = self.capacity.reserve(min(longest, self.context_length))
        try:
            while not reservation.granted.wait(_WAIT_SECONDS):
                yield
            with self.server.watching(self.server.connect()) as connection:
                found = yield from self._read(connection, kept, tree)
        finally:
            self.capacity.release(reservation)
        return ChoiceScores(found, len(prompt))

    def _read(
        self, connection: Connection, prompt: Sequence[int], tree: ChoiceTree
    ) -> Generator[None, None, dict[str, float]]:
        """The probability of each choice of a tree after a prompt."""
        needed: dict[tuple[int, ...], set[int]] = collections.defaultdict(set)
        for tail in tree.tails.values():
            for length, token in enumerate(tail):
                needed[tail[:length]].add(token)
        found = {}
        for start, tokens in sorted(needed.items()):
            found[start] = yield from self.probabilities.after(
                connection, [*prompt, *start], tokens
            )
        return tree.read(
            [
                np.array([found[path[:length]] for length in range(len(path) + 1)])
                for path in tree.paths
            ]
        )

    def _encode(
        self, text: str, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = self.server.post("/tokenize", body)["tokens"]
        return tokens

    def _chat_tokenizer(self, model: GgufModel) -> ChatTokenizer:
        # llama.cpp takes some tokens for control tokens by their text, whatever the file says.
        spelled = "\n".join(model.lookalikes.values())
        found = set(self._encode(spelled)) - set(self._encode(spelled, parse_special=False))
        tokens = {
            number: Token(text, special=True)
            for number, text in model.lookalikes.items()
            if number in found
        }
        tokenizer = GgufTokenizer({**model.tokens, **tokens}, model.vocabulary, self._encode)
        chat = ChatTokenizer(tokenizer, model.template, model.special_tokens, frozenset())
        begins = self._encode("", add_special=True)[:1]
        if begins == [model.bos] and chat.encode(PROBE)[:1] != begins:
            # Every text of this model begins with a token that its template does not write.
            template = "{{ bos_token }}" + model.template
            chat = ChatTokenizer(tokenizer, template, model.special_tokens, frozenset())
        return chat

    def _check_adapter(self) -> None:
        _, probabilities = self.next_token(PROBE)
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model's probabilities are not finite numbers")

    def _versions(self, program: str | None) -> Mapping[str, str]:
        if program is None:
            return {"xllamacpp": importlib.metadata.version("xllamacpp")}
        return {"llama.cpp": str(self.server.get("/props").get("build_info"))}


def context_of(model: GgufModel) -> tuple[int, tuple[str, ...]]:
    """The context that fits the memory, in tokens, and a note if the model has a longer one."""
    trained = model.context_length or _LEAST_CONTEXT
    free = free_memory()
    held = _MOST_CONTEXT
    if free is not None and model.cache_bytes:
        weights = sum(file.stat().st_size for file in model.files)
        held = (free - weights) // _SHARE_OF_MEMORY // model.cache_bytes
    context = min(trained, max(_LEAST_CONTEXT, min(held, _MOST_CONTEXT)))
    if context == trained:
        return trained, ()
    context -= context % _CONTEXT_STEP
    return context, (
        f"the context is {context} of the model's {trained} tokens, to bound the memory",
    )


def _adapter_file(folder: Path, model: GgufModel) -> Path:
    """The adapter in a folder.

    Raises:
        AdapterRejected: it holds none, or one for another model.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise AdapterRejected(
            f"{folder} holds {len(files)} .gguf files; it needs one, made with llama.cpp's "
            "convert_lora_to_gguf.py"
        )
    try:
        check_adapter(files[0], model)
    except ModelUnavailable as error:
        raise AdapterRejected(error.detail) from None
    return files[0]

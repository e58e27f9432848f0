"""GGUF models: llama.cpp computes, in a server process of its own.

llama.cpp batches its requests itself. So a batch here is a set of streamed answers, each read by a
thread. Prompts are rendered and encoded as for all engines and sent as tokens.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import (
    ANSWER_TOKENS,
    PREFILL_CHUNK,
    PROBE,
    Delta,
    GenerationRequest,
    Message,
    Sampling,
    softmax,
    steps_alone,
)
from llm_sidecar.engines.chat import ChatTokenizer
from llm_sidecar.engines.gbnf import to_gbnf
from llm_sidecar.engines.gguf_model import GgufModel, Token, check_adapter, read_model
from llm_sidecar.engines.gguf_tokenizer import GgufTokenizer
from llm_sidecar.engines.llama_batch import FreeContext, LlamaBatch
from llm_sidecar.engines.llama_server import LlamaServer, Options, find_program
from llm_sidecar.engines.sampling import sampling_of
from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.free_memory import free_memory

SLOTS: Final = 4
"""Requests that are generated at the same time."""
_MOST_LIKELY: Final = 512
"""Tokens whose probabilities a score asks for at first; an answer of all tokens takes megabytes."""
_CACHE_MIB: Final = 256
"""Memory for the states of earlier prompts beside those in the slots, in MiB."""
_SHARE_OF_MEMORY: Final = 8
"""The states of all prompts take an eighth of the memory that the weights leave free."""
_LEAST_CONTEXT: Final = 4096
_MOST_CONTEXT: Final = 16_384
_CONTEXT_STEP: Final = 256
"""llama.cpp rounds a context up to a multiple of this."""


class _Token(msgspec.Struct):
    id: int
    logprob: float


class _Position(msgspec.Struct):
    top_logprobs: list[_Token]


class _Probabilities(msgspec.Struct):
    """The part of an answer that holds the probabilities of the next token."""

    completion_probabilities: list[_Position]


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
        self.free_context = FreeContext(self.context_length)
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
            self._vocabulary = model.vocabulary
            self._chat = self._chat_tokenizer(model)
            self.notes += self._chat.notes
            if adapter is not None:
                self._check_adapter()
        except BaseException:
            self.server.close()
            raise

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        return self._chat.prompt(request, self.context_length, header)

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
        body = self.body(GenerationRequest([], 1 + count), [0, 0]) | {"ignore_eos": True}
        with contextlib.closing(self.server.connect()) as connection:
            done = 0
            for event in self.server.events(connection, "/completion", body):
                # A character of several tokens comes as one event.
                while done < event.get("tokens_predicted", 0):
                    done += 1
                    yield

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        return prompt, softmax(self._log_probabilities(prompt, self._vocabulary)[:-1])

    def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        tokens: Sequence[int] | None = None,
    ) -> dict[str, float]:
        prompt = self.tokenize(GenerationRequest(messages, ANSWER_TOKENS, tokens=tokens))
        tree = self._chat.choice_tree(messages, prompt, tuple(choices))
        kept = prompt[: len(prompt) - tree.replaced]
        with self.free_context.reserved(len(prompt) + ANSWER_TOKENS):
            found = tree.read(self._logits(kept, tree.paths, _MOST_LIKELY))
            if min(found.values()) > 0.0:
                return found
            return tree.read(self._logits(kept, tree.paths, self._vocabulary))

    # Called by `LlamaBatch`

    def body(self, request: GenerationRequest, prompt: Sequence[int]) -> dict[str, Any]:
        """The JSON body of a completion request.

        Raises:
            ValueError: the guidance cannot be written as a grammar.
        """
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": request.max_tokens,
            "cache_prompt": True,
            "stream": True,
            "return_progress": True,
        }
        sampling = sampling_of(request, self.sampling)
        body |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            # Of the whole prompt and completion, as in the other engines.
            "repeat_last_n": self.context_length,
        }
        if request.seed is not None:
            body["seed"] = request.seed
        if request.guidance is not None:
            body["grammar"] = to_gbnf(request.guidance)
        return body

    def _logits(
        self, prompt: Sequence[int], paths: Sequence[Sequence[int]], count: int
    ) -> list[npt.NDArray[np.float32]]:
        """See `ChoiceTree.read`; only of the `count` most likely tokens."""
        return [
            np.array(
                [
                    self._log_probabilities([*prompt, *path[:length]], count)
                    for length in range(len(path) + 1)
                ]
            )
            for path in paths
        ]

    def _log_probabilities(self, tokens: Sequence[int], count: int) -> npt.NDArray[np.float32]:
        """The logarithm of the probability of each next token, before sampling.

        Args:
            count: the number of most likely tokens to ask for; the others get -inf.

        Returns:
            (vocabulary + 1,); the last one is that of all tokens not asked for.
        """
        answer = self.server.post_raw(
            "/completion",
            {
                "prompt": tokens,
                "n_predict": 1,
                "n_probs": count,
                "post_sampling_probs": False,
                "temperature": 0.0,
                "cache_prompt": True,
            },
        )
        (position,) = msgspec.json.decode(answer, type=_Probabilities).completion_probabilities
        found = np.full(self._vocabulary + 1, -np.inf)
        for one in position.top_logprobs:
            found[one.id] = one.logprob
        rest = 1.0 - np.exp(found).sum()
        if rest > 0.0:
            found[-1] = np.log(rest)
        return found.astype(np.float32)

    def _chat_tokenizer(self, model: GgufModel) -> ChatTokenizer:
        def encode(text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
            body = {
                "content": text,
                "add_special": add_special,
                "parse_special": parse_special,
            }
            tokens: list[int] = self.server.post("/tokenize", body)["tokens"]
            return tokens

        # llama.cpp takes some tokens for control tokens by their text, whatever the file says.
        spelled = "\n".join(model.lookalikes.values())
        found = set(encode(spelled)) - set(encode(spelled, parse_special=False))
        tokens = {
            number: Token(text, special=True)
            for number, text in model.lookalikes.items()
            if number in found
        }
        tokenizer = GgufTokenizer({**model.tokens, **tokens}, encode)
        chat = ChatTokenizer(tokenizer, model.template, model.special_tokens, frozenset())
        begins = encode("", add_special=True)[:1]
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

"""onnxruntime-genai: folders with a `genai_config.json`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og

from llm_sidecar.engines.base import (
    ANSWER_TOKENS,
    PROBE,
    Delta,
    GenerationRequest,
    Message,
    prefill_steps,
    softmax,
)
from llm_sidecar.engines.chat import ChatTokenizer, end_tokens
from llm_sidecar.engines.prefixes import Kept, Prefixes
from llm_sidecar.errors import AdapterRejected, ModelUnavailable

_FAST_FORWARD_HEADROOM: Final = 128
"""Forced tokens may run past max_length and crash the attention kernel, so leave them room."""

_ADAPTER: Final = "adapter"
"""The name of the loaded adapter in the runtime."""

_ROOM_STEP: Final = 512
"""Tokens by which room grows; a prepared prefix has as many for the prompt that follows."""


def has_cuda() -> bool:
    """Whether the runtime that is installed finds a GPU."""
    return bool(og.is_cuda_available())


class _Kind(NamedTuple):
    """What a generator is made for, and cannot be changed afterwards."""

    guidance: str | None = None
    temperature: float = 0.0
    seed: int | None = None


class _Cache:
    """A generator, which keeps its attention states between two prompts.

    Attributes:
        room: greatest number of tokens of prompt and completion.
    """

    rewinds = True

    def __init__(self, generator: Any, room: int) -> None:
        self.generator = generator
        self.room = room

    def rewind(self, length: int) -> None:
        """Forgets all but the first tokens; the guidance begins anew."""
        self.generator.rewind_to(length)


class OnnxEngine:
    """A model built by `onnxruntime_genai.models.builder`."""

    runtime = "onnxruntime-genai"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        adapter: Path | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: holds genai_config.json, the model and its tokenizer.
            device: `auto` takes CUDA where the runtime has it.
            threads: of the decoder session, on CPU.
            adapter: folder with an `adapter.onnx_adapter`, as `models.lora` writes it. A model
                that is loaded without one is a little faster.

        Raises:
            ModelUnavailable: `cuda` is asked for and the runtime has none.
            AdapterRejected: says why the adapter does not fit.
        """
        if device == "cuda" and not has_cuda():
            raise ModelUnavailable(
                "DEVICE=cuda, but the installed onnxruntime-genai has no CUDA; "
                "install onnxruntime-genai-cuda or set DEVICE=cpu"
            )
        self.device = "cuda" if device != "cpu" and has_cuda() else "cpu"
        config = og.Config(str(folder))
        if self.device == "cuda":
            config.clear_providers()
            config.append_provider("cuda")
        else:
            session = {
                "intra_op_num_threads": threads,
                "session.intra_op.allow_spinning": "0",
            }
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        written = json.loads((folder / "genai_config.json").read_bytes())
        if adapter is not None:
            # It takes 30 MB, which most workers do without.
            from llm_sidecar.engines.lora_graph import checked_adapter, read_lora_graph

            name = written["model"]["decoder"]["filename"]
            graph = read_lora_graph(folder / name)
            adapter_file = checked_adapter(adapter, graph.projections)
            config.add_model_data(name, graph.serialized)
        self.model = og.Model(config)
        self._chat = ChatTokenizer.from_folder(folder, end_tokens(written["model"]))
        self.tokenizer = self._chat.tokenizer
        self.context_length = int(written["model"]["context_length"])
        self._prefixes: Prefixes[_Kind, _Cache] = Prefixes(self._new_cache)
        self._adapters: Any = None
        if adapter is not None:
            self._load_adapter(adapter_file)

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        return self._chat.prompt(request, self.context_length - _headroom(request), header)

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        prompt = self.tokenize(request)
        count, limit = len(prompt), request.max_tokens
        guided = request.guidance is not None
        kind = _Kind(request.guidance, request.temperature, request.seed)
        with self._borrowed(kind, prompt, count + limit + _headroom(request)) as kept:
            cached = len(kept.tokens)
            for _ in self._read(kept, prompt):
                yield Delta("", count, 0, cached)
            generator = kept.cache.generator
            decode, ends = self._chat.decoder(), self._chat.ends
            done, ended = 0, False
            while not generator.is_done() and done < limit:
                generator.generate_next_token()
                written = generator.get_sequence(0)[count:]
                step = written[done:limit]
                done += len(step)
                # A step under guidance may end without a token.
                ended = any(int(token) in ends for token in step)
                text = "".join(decode(token) for token in step if int(token) not in ends)
                yield Delta(text, count, done, cached)
            # Unguided it is done where its room ends, too.
            ended = ended or (guided and generator.is_done() and len(written) <= limit)
        yield Delta("", count, done, cached, "stop" if ended else "length")

    def together(self) -> OneByOne:
        return OneByOne(self)

    def prepare(self, request: GenerationRequest) -> Generator[None]:
        prompt = self.tokenize(request, header=False)
        room = len(prompt) + request.max_tokens + _headroom(request)
        kind = _Kind(request.guidance, request.temperature, request.seed)
        with self._borrowed(kind, (), min(room + _ROOM_STEP, self.context_length)) as kept:
            yield from self._read(kept, prompt)

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
        with self._borrowed(_Kind(), prompt, len(prompt) + 2) as kept:
            generator = kept.cache.generator
            for start, stop in prefill_steps(len(kept.tokens), len(prompt)):
                # The branch goes with the last of the prompt: one pass gives the logits of both.
                generator.append_tokens(prompt[start:stop] + branch * (stop == len(prompt)))
            kept.tokens = list(prompt)
            logits = generator.get_output("logits")[0, -1 - len(branch) :]
        return tree.read(logits[0], logits[1] if branch else None)

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        with self._borrowed(_Kind(), prompt, len(prompt) + 1) as kept:
            for _ in self._read(kept, prompt):
                pass
            return prompt, softmax(kept.cache.generator.get_logits().reshape(-1))

    def _load_adapter(self, file: Path) -> None:
        """Loads an adapter, and checks that the model answers with it."""
        self._adapters = og.Adapters(self.model)
        try:
            self._adapters.load(str(file), _ADAPTER)
            _, probabilities = self.next_token(PROBE)
        except Exception as error:  # noqa: BLE001 - the runtime raises bare ones
            raise AdapterRejected(
                f"the model does not run with it: {type(error).__name__}"
            ) from None
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model's probabilities are not finite numbers")

    def _borrowed(
        self, kind: _Kind, prompt: Sequence[int], room: int
    ) -> contextlib.AbstractContextManager[Kept[_Cache]]:
        if kind.seed is not None:
            # Its random numbers have to begin anew.
            return contextlib.nullcontext(Kept(self._new_cache(kind, room)))
        return self._prefixes.borrowed(kind, prompt, room)

    def _read(self, kept: Kept[_Cache], prompt: Sequence[int]) -> Iterator[None]:
        """Reads what is left of a prompt in steps, between which it can be cancelled."""
        for start, stop in prefill_steps(len(kept.tokens), len(prompt)):
            kept.cache.generator.append_tokens(prompt[start:stop])
            kept.tokens += prompt[start:stop]
            if stop < len(prompt):
                yield

    def _new_cache(self, kind: _Kind, room: int) -> _Cache:
        # Room is made in steps, so that a prompt that is a little longer than the last one fits.
        room = min(self.context_length, -(-room // _ROOM_STEP) * _ROOM_STEP)
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=room, **_sampling(kind))
        if kind.guidance is not None:
            params.set_guidance("json_schema", kind.guidance, True)
        generator = og.Generator(self.model, params)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, _ADAPTER)
        return _Cache(generator, room)


def _headroom(request: GenerationRequest) -> int:
    return 0 if request.guidance is None else _FAST_FORWARD_HEADROOM


def _sampling(kind: _Kind) -> dict[str, Any]:
    if kind.temperature == 0.0:
        return {"do_sample": False}
    options = {"do_sample": True, "temperature": kind.temperature, "top_k": 0, "top_p": 1.0}
    if kind.seed is not None:
        options["random_seed"] = kind.seed
    return options


class OneByOne:
    """A single request: on a CPU this runtime reckons none faster together."""

    most = 1

    def __init__(self, engine: OnnxEngine) -> None:
        """Runs nothing."""
        self._engine = engine
        self._running: dict[int, Generator[Delta]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def add(self, number: int, request: GenerationRequest) -> None:
        """See `Together`."""
        self._running[number] = self._engine.stream(request)

    def remove(self, number: int) -> None:
        """See `Together`."""
        self._running.pop(number).close()

    def step(self) -> list[tuple[int, Delta]]:
        """See `Together`."""
        ((number, steps),) = self._running.items()
        try:
            delta = next(steps)
        except BaseException:
            del self._running[number]
            raise
        if delta.finish_reason is not None:
            self.remove(number)
        return [(number, delta)]

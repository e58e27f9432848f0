"""transformers on torch: folders in the Hugging Face format, safetensors only."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

# Nothing here is compiled, yet loading a model makes this folder where none is named.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())

import llguidance
import llguidance.hf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from llm_sidecar.engines.base import (
    PROBE,
    AnswerTree,
    Delta,
    GenerationRequest,
    Message,
    SpecialTokens,
    check_context,
    one_line,
    prefill_steps,
    softmax,
)
from llm_sidecar.engines.prefixes import Kept, Prefixes
from llm_sidecar.errors import AdapterRejected, ModelUnavailable

_ADAPTER_FILE: Final = "adapter_model.safetensors"


class _Cache:
    """Attention states that can be cut.

    Attributes:
        room: greatest number of tokens; they take as much memory as they need.
    """

    def __init__(self, config: Any) -> None:
        self.states = DynamicCache(config=config)
        self.room = sys.maxsize

    @property
    def rewinds(self) -> bool:
        """A layer with a sliding window has lost what it would go back to."""
        return not any(self.states.is_sliding)

    def rewind(self, length: int) -> None:
        """Forgets all but the first tokens."""
        self.states.crop(length - self.states.get_seq_length())


class TorchEngine:
    """Any causal language model that transformers knows without code of its own."""

    runtime = "transformers"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        adapter: Path | None = None,
    ) -> None:
        """Loads the model, in float32 on CPU and in its own precision on CUDA.

        Args:
            folder: config.json, *.safetensors and the tokenizer with its chat template.
            device: `auto` takes CUDA where torch finds it.
            threads: of torch's operators, on CPU.
            adapter: folder of a PEFT LoRA adapter, in safetensors.

        Raises:
            ModelUnavailable: `cuda` is asked for and torch has none, or there is no chat template.
            AdapterRejected: says why the adapter does not fit.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelUnavailable("DEVICE=cuda, but torch finds no CUDA here; set DEVICE=cpu")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if not self.tokenizer.chat_template:
            raise ModelUnavailable("the model's tokenizer has no chat template; add one to it")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if self.device == "cpu" else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).to(self.device)
        self.model.eval()
        self.context_length = int(self.model.config.max_position_embeddings)
        self._eos = self._end_tokens()
        self._special = SpecialTokens(folder)
        self._guidance_tokenizer: Any = None
        self._answer_trees: dict[tuple[str, ...], AnswerTree] = {}
        self._prefixes = self._no_prefixes()
        self._adapter: str | None = None
        self._adapters_taken = 0
        if adapter is not None:
            self.use_adapter(adapter)

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        prompt = self._encode(request.messages)
        count, limit = len(prompt), request.max_tokens
        check_context(count, limit, self.context_length)
        matcher = self._matcher(request.guidance)
        random = torch.Generator(self.device)
        if request.seed is None:
            random.seed()  # otherwise every generator begins alike
        else:
            random.manual_seed(request.seed)
        decoder = DecodeStream(skip_special_tokens=True)
        with self._prefixes.borrowed(None, prompt, count + limit) as kept:
            cached = len(kept.tokens)
            for _ in self._read(kept, prompt[:-1]):
                yield Delta("", count, 0, cached)
            pending, done, ended = prompt[-1:], 0, False
            while not ended and done < limit:
                logits = self._forward(pending, kept.cache.states)[-1]
                token = self._sample(logits, matcher, request.temperature, random)
                pending = [token]
                if matcher is not None:
                    matcher.consume_token(token)
                    pending += matcher.compute_ff_tokens()
                    matcher.consume_tokens(pending[1:])
                pending = pending[: limit - done]
                done += len(pending)
                ended = pending[-1] in self._eos or (matcher is not None and matcher.is_stopped())
                written = [token for token in pending if token not in self._eos]
                pieces = (decoder.step(self.tokenizer.backend_tokenizer, t) for t in written)
                yield Delta("".join(piece or "" for piece in pieces), count, done, cached)
        yield Delta("", count, done, cached, "stop" if ended else "length")

    def prepare(self, request: GenerationRequest) -> Generator[None]:
        prompt = self._tokens(
            self._template(self._special.neutralise(request.messages), header=False)
        )
        if len(prompt) + request.max_tokens > self.context_length:
            return
        with self._prefixes.borrowed(None, (), len(prompt)) as kept:
            yield from self._read(kept, prompt)

    def answer_probabilities(
        self, messages: Sequence[Message], answers: Sequence[str]
    ) -> dict[str, float]:
        prompt = self._encode(messages)
        check_context(len(prompt), 2, self.context_length)
        tree = self._answer_tree(tuple(answers))
        branch = [] if tree.branch is None else [tree.branch]
        with self._prefixes.borrowed(None, prompt, len(prompt) + 2) as kept:
            rest = prompt[len(kept.tokens) :] + branch
            logits = self._forward(rest, kept.cache.states, keep=1 + len(branch))
            kept.tokens = list(prompt)
        values = logits.float().cpu().numpy()
        return tree.read(values[0], values[1] if branch else None)

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self._encode(messages)
        check_context(len(prompt), 1, self.context_length)
        with self._prefixes.borrowed(None, prompt, len(prompt)) as kept:
            logits = self._forward(prompt[len(kept.tokens) :], kept.cache.states)[-1]
            kept.tokens = list(prompt)
        return prompt, softmax(logits.float().cpu().numpy())

    def _read(self, kept: Kept[_Cache], prompt: Sequence[int]) -> Iterator[None]:
        """Reads what is left of a prompt in steps, after each of which it can be cancelled."""
        for start, stop in prefill_steps(len(kept.tokens), len(prompt)):
            self._forward(prompt[start:stop], kept.cache.states)
            kept.tokens += prompt[start:stop]
            yield

    def use_adapter(self, folder: Path) -> None:
        self._adapters_taken += 1
        name = f"adapter{self._adapters_taken}"
        former, kept = self._adapter, self._prefixes
        # Other formats of PEFT are pickles.
        if not (folder / _ADAPTER_FILE).is_file():
            raise AdapterRejected(f"it holds no {_ADAPTER_FILE}")
        try:
            self.model.load_adapter(str(folder), adapter_name=name)
            self.model.set_adapter(name)
            self._check_adapter(folder, name)
        except Exception as error:
            if name in getattr(self.model, "peft_config", {}):
                self.model.delete_adapter(name)
            if former is not None:
                self.model.set_adapter(former)
            self._prefixes = kept
            if isinstance(error, AdapterRejected):
                raise
            raise AdapterRejected(f"it does not fit the model: {one_line(error)}") from None
        if former is not None:
            self.model.delete_adapter(former)
        self._adapter = name

    def _check_adapter(self, folder: Path, name: str) -> None:
        """Makes sure that all of the adapter has a place in the model, and that it answers."""
        with safe_open(folder / _ADAPTER_FILE, "np") as file:
            stored = {key.replace("base_model.model.", "", 1) for key in file.keys()}  # noqa: SIM118 - it is no dict
        placed = {
            key.replace(f".{name}.", ".") for key in self.model.state_dict() if f".{name}." in key
        }
        if stored != placed:
            different = min(stored ^ placed)
            raise AdapterRejected(f"it and the model do not both have {different}")
        self._prefixes = self._no_prefixes()
        _, probabilities = self.next_token(PROBE)
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model answers with no numbers")

    def _no_prefixes(self) -> Prefixes[None, _Cache]:
        return Prefixes(lambda kind, room: _Cache(self.model.config))

    def _forward(self, tokens: Sequence[int], cache: DynamicCache, keep: int = 1) -> torch.Tensor:
        """Logits (keep, vocabulary) of the last positions; `cache` takes in the tokens."""
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.device)
            out = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _sample(
        self, logits: torch.Tensor, matcher: Any, temperature: float, random: torch.Generator
    ) -> int:
        logits = logits.float()
        if matcher is not None:
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
            padding = (0, logits.shape[-1] - len(allowed))
            mask = torch.from_numpy(np.pad(allowed, padding)).to(self.device)
            logits = logits.masked_fill(~mask, float("-inf"))
        if temperature == 0.0:
            return int(logits.argmax())
        weights = torch.softmax(logits / temperature, dim=-1)
        return int(torch.multinomial(weights, 1, generator=random))

    def _matcher(self, guidance: str | None) -> Any:
        if guidance is None:
            return None
        if self._guidance_tokenizer is None:
            self._guidance_tokenizer = llguidance.hf.from_tokenizer(self.tokenizer)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(guidance)
        matcher = llguidance.LLMatcher(self._guidance_tokenizer, grammar)
        if matcher.is_error():
            raise ValueError(f"the guidance schema is refused: {matcher.get_error()}")
        return matcher

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        text = self._template(self._special.neutralise(messages))
        return self._tokens(text)

    def _template(self, messages: Sequence[Message], header: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=header
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def _answer_tree(self, answers: tuple[str, ...]) -> AnswerTree:
        if answers not in self._answer_trees:
            turn = [{"role": "user", "content": "?"}]
            header = self._template(turn)[len(self._template(turn, header=False)) :]
            skip = len(self._tokens(header))
            encoded = {answer: self._tokens(header + answer)[skip:] for answer in answers}
            self._answer_trees[answers] = AnswerTree(encoded)
        return self._answer_trees[answers]

    def _end_tokens(self) -> frozenset[int]:
        configured = self.model.generation_config.eos_token_id
        tokens = configured if isinstance(configured, list) else [configured]
        return frozenset(t for t in (*tokens, self.tokenizer.eos_token_id) if t is not None)

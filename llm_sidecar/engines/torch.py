"""transformers on torch: folders in the Hugging Face format, safetensors only."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

# Nothing here is compiled, yet loading a model makes this folder where none is named.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())

import llguidance
import llguidance.hf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_sidecar.engines.base import (
    ANSWER_TOKENS,
    PROBE,
    Delta,
    GenerationRequest,
    Message,
    one_line,
    prefill_steps,
    softmax,
)
from llm_sidecar.engines.batches import Batches, stream_alone
from llm_sidecar.engines.chat import TOKENIZER_FILE, ChatTokenizer
from llm_sidecar.engines.chat_template import read_template
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.peft_files import WEIGHTS_FILE, matrix_of, read_config
from llm_sidecar.engines.prefixes import Kept, Prefixes
from llm_sidecar.engines.torch_rows import TorchRows, empty_cache, most_together
from llm_sidecar.errors import AdapterRejected, ModelUnavailable

_ADAPTER: Final = "default"
"""The name of the loaded adapter in PEFT."""


class _Cache:
    """Attention states that can be cut.

    Attributes:
        room: greatest number of tokens; they take as much memory as they need.
    """

    def __init__(self, config: Any) -> None:
        self.states = empty_cache(config)
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
            ModelUnavailable: `cuda` is asked for and torch has none, or the tokenizer or its chat
                template is missing or broken.
            AdapterRejected: says why the adapter does not fit.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelUnavailable("DEVICE=cuda, but torch finds no CUDA here; set DEVICE=cpu")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)
        self.tokenizer = _load_tokenizer(folder)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if self.device == "cpu" else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).to(self.device)
        self.model.eval()
        self.context_length = int(self.model.config.max_position_embeddings)
        self.most_together = most_together(self.model.config)
        self._chat = self._chat_tokenizer(folder)
        self._guidance_tokenizer: Any = None
        self._prefixes: Prefixes[None, _Cache] = Prefixes(
            lambda kind, room: _Cache(self.model.config)
        )
        if adapter is not None:
            self._load_adapter(adapter)

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        return self._chat.prompt(request, self.context_length, header)

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        return stream_alone(self, request)

    def together(self) -> Batches[_Cache]:
        return Batches(self)

    def begin(self, request: GenerationRequest) -> Generation:
        """See `BatchingEngine`."""
        prompt = self.tokenize(request)
        return Generation(
            request,
            prompt,
            decode=self._chat.decoder(),
            ends=self._chat.ends,
            matcher=self._matcher(request.guidance),
        )

    @contextlib.contextmanager
    def borrowed(self, generation: Generation) -> Iterator[Kept[_Cache]]:
        """See `BatchingEngine`."""
        with self._prefixes.borrowed(None, generation.prompt, len(generation.prompt)) as kept:
            generation.cached = len(kept.tokens)
            yield kept

    def prepare(self, request: GenerationRequest) -> Generator[None]:
        prompt = self.tokenize(request, header=False)
        with self._prefixes.borrowed(None, (), len(prompt)) as kept:
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
        with self._prefixes.borrowed(None, prompt, len(prompt) + 2) as kept:
            rest = prompt[len(kept.tokens) :] + branch
            logits = self.forward(rest, kept.cache, keep=1 + len(branch))
            kept.tokens = list(prompt)
        return tree.read(logits[0], logits[1] if branch else None)

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        with self._prefixes.borrowed(None, prompt, len(prompt)) as kept:
            logits = self.forward(prompt[len(kept.tokens) :], kept.cache)[-1]
            kept.tokens = list(prompt)
        return prompt, softmax(logits)

    def reading(self, generation: Generation, kept: Kept[_Cache]) -> Iterator[None]:
        """See `BatchingEngine`."""
        return self._read(kept, generation.prompt[:-1])

    def _read(self, kept: Kept[_Cache], prompt: Sequence[int]) -> Iterator[None]:
        """Reads what is left of a prompt in steps, after each of which it can be cancelled."""
        for start, stop in prefill_steps(len(kept.tokens), len(prompt)):
            self.forward(prompt[start:stop], kept.cache)
            kept.tokens += prompt[start:stop]
            yield

    def _load_adapter(self, folder: Path) -> None:
        stored = self._stored(folder)
        try:
            self.model.load_adapter(str(folder), adapter_name=_ADAPTER)
            self.model.set_adapter(_ADAPTER)
            self._check_adapter(stored)
        except AdapterRejected:
            raise
        except Exception as error:  # noqa: BLE001 - transformers and PEFT raise bare ones
            raise AdapterRejected(f"it does not fit the model: {one_line(error)}") from None

    def _stored(self, folder: Path) -> set[tuple[str, str]]:
        """The matrices in an adapter's files; what is not one would be written over the model."""
        read_config(folder)
        if (folder / WEIGHTS_FILE).stat().st_size > self.model.get_memory_footprint():
            raise AdapterRejected(f"its {WEIGHTS_FILE} is larger than the model")
        try:
            with safe_open(folder / WEIGHTS_FILE, "np") as file:
                return {matrix_of(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise AdapterRejected(f"its {WEIGHTS_FILE} cannot be read: {error}") from None

    def _check_adapter(self, stored: set[tuple[str, str]]) -> None:
        """Makes sure that all of the adapter has a place in the model, and that it answers."""
        placed = {
            matrix_of(key.replace(f".{_ADAPTER}.", "."))
            for key in self.model.state_dict()
            if f".{_ADAPTER}." in key
        }
        if stored != placed:
            module, half = min(stored ^ placed)
            raise AdapterRejected(f"it and the model do not both have {module}.lora_{half}")
        _, probabilities = self.next_token(PROBE)
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model's probabilities are not finite numbers")

    def forward(self, tokens: Sequence[int], cache: _Cache, keep: int = 1) -> Logits:
        """See `BatchingEngine`."""
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.device)
            out = self.model(
                input_ids=ids, past_key_values=cache.states, use_cache=True, logits_to_keep=keep
            )
        logits: Logits = out.logits[0].float().cpu().numpy()
        return logits

    def joined(
        self, caches: Mapping[int, _Cache], size: int, former: TorchRows | None
    ) -> TorchRows:
        """See `BatchingEngine`."""
        states = {number: cache.states for number, cache in caches.items()}
        return TorchRows(self.model, states, former)

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

    def _chat_tokenizer(self, folder: Path) -> ChatTokenizer:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return ChatTokenizer(
            self.tokenizer.backend_tokenizer,
            read_template(folder) if template is None else template,
            self.tokenizer.special_tokens_map,
            self._end_tokens(),
        )

    def _end_tokens(self) -> frozenset[int]:
        configured = self.model.generation_config.eos_token_id
        tokens = configured if isinstance(configured, list) else [configured]
        return frozenset(t for t in (*tokens, self.tokenizer.eos_token_id) if t is not None)


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, also in a format older than tokenizer.json.

    Raises:
        ModelUnavailable: the folder has no tokenizer that the `tokenizers` package can run.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 - transformers raises bare ones
        reason = one_line(error)
    else:
        # Without any file transformers returns a tokenizer with an empty vocabulary.
        files = tokenizer.vocab_files_names.values()
        if not any((folder / name).is_file() for name in files):
            reason = f"it holds none of {', '.join(sorted(files))}"
        elif not hasattr(tokenizer, "backend_tokenizer"):
            reason = f"{type(tokenizer).__name__} cannot be converted to {TOKENIZER_FILE}"
        else:
            return tokenizer
    raise ModelUnavailable(
        f"{folder} has no usable tokenizer; add the model's {TOKENIZER_FILE} ({reason})"
    )

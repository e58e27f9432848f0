"""transformers on torch: folders in the Hugging Face format, safetensors only."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

# Without this, loading a model creates a cache folder, although nothing is compiled.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_sidecar.engines.base import Dtype
from llm_sidecar.engines.chat import TOKENIZER_FILE, ChatTokenizer
from llm_sidecar.engines.chat_template import read_template
from llm_sidecar.engines.checkpoint import (
    cannot_load,
    check_packages,
    count_weights,
    quantization_method,
)
from llm_sidecar.engines.context import prefill_steps
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.generation import Logits
from llm_sidecar.engines.peft_files import WEIGHTS_FILE, matrix_of, read_config
from llm_sidecar.engines.processor import multiplies_bfloat16
from llm_sidecar.engines.torch_states import TorchRows, batch_capacity, empty_cache
from llm_sidecar.errors import AdapterRejected, ModelUnavailable, one_line

_ADAPTER: Final = "default"
"""The name of the loaded adapter in PEFT."""
_SMALL: Final = 1 << 24
"""Weights of a model that `auto` leaves in float32, which takes 64 MB: the demo model computes the
same on every processor."""


class TorchStates:
    """Attention states of one row.

    Attributes:
        capacity: maximum number of tokens; unbounded, because the cache grows.
        cache: transformers' own.
    """

    capacity = sys.maxsize

    def __init__(self, config: Any) -> None:
        self.cache = empty_cache(config)

    @property
    def rewinds(self) -> bool:
        """False with a sliding window, which drops the states before it."""
        return not any(self.cache.is_sliding)

    def rewind(self, length: int) -> None:
        """See `States`."""
        self.cache.crop(length - self.cache.get_seq_length())


class TorchEngine(Decoder[TorchStates]):
    """Any causal language model that transformers supports without remote code."""

    runtime = "transformers"
    batches_prompts = True

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        adapter: Path | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: config.json, *.safetensors and the tokenizer with its chat template.
            device: `auto` takes CUDA if torch finds it.
            threads: of torch's operators, on CPU.
            adapter: folder of a PEFT LoRA adapter, in safetensors.
            dtype: the precision to compute in; `auto` is bfloat16 on a CPU that multiplies it, but
                float32 for a small model. None is float32 on CPU. On CUDA, `auto` and None are the
                precision of its files. Logits are float32.

        Raises:
            ModelUnavailable: `cuda` is requested and torch has none, or the tokenizer or its chat
                template is missing or broken.
            AdapterRejected: the adapter does not fit.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelUnavailable("DEVICE=cuda, but torch finds no CUDA here; set DEVICE=cpu")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)
        tokenizer = _load_tokenizer(folder)
        self.model = _load_model(folder, _chosen_dtype(folder, dtype, self.device))
        self.model.to(self.device).eval()
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.batch_capacity = batch_capacity(self.model.config)
        chat = _chat_tokenizer(folder, tokenizer, self.model.generation_config.eos_token_id)
        super().__init__(chat, int(self.model.config.max_position_embeddings))
        self.tokenizer = tokenizer
        if adapter is not None:
            self._load_adapter(adapter)

    def _load_adapter(self, folder: Path) -> None:
        stored = self._stored(folder)
        try:
            self.model.load_adapter(str(folder), adapter_name=_ADAPTER)
            self.model.set_adapter(_ADAPTER)
            self._check_placed(stored)
            self.check_adapter()
        except AdapterRejected:
            raise
        except Exception as error:  # noqa: BLE001 - transformers and PEFT raise bare ones
            raise AdapterRejected(f"it does not fit the model: {one_line(error)}") from None

    def _stored(self, folder: Path) -> set[tuple[str, str]]:
        """The matrices in an adapter's files; other tensors would replace weights of the model."""
        read_config(folder)
        if (folder / WEIGHTS_FILE).stat().st_size > self.model.get_memory_footprint():
            raise AdapterRejected(f"its {WEIGHTS_FILE} is larger than the model")
        try:
            with safe_open(folder / WEIGHTS_FILE, "np") as file:
                return {matrix_of(key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
        except SafetensorError as error:
            raise AdapterRejected(f"its {WEIGHTS_FILE} cannot be read: {error}") from None

    def _check_placed(self, stored: set[tuple[str, str]]) -> None:
        """Checks that the adapter's matrices match the adapted modules of the model, one to one."""
        placed = {
            matrix_of(key.replace(f".{_ADAPTER}.", "."))
            for key in self.model.state_dict()
            if f".{_ADAPTER}." in key
        }
        if stored != placed:
            module, half = min(stored ^ placed)
            raise AdapterRejected(f"it and the model do not both have {module}.lora_{half}")

    def new_states(self, capacity: int) -> TorchStates:
        """See `Decoder`."""
        return TorchStates(self.model.config)

    def forward(self, tokens: Sequence[int], states: TorchStates) -> Logits:
        """See `Decoder`."""
        logits: Logits = self._run(tokens, states, 1)[0]
        return logits

    def all_logits(self, prompt: Sequence[int], states: TorchStates) -> Iterator[Logits]:
        """See `Decoder`."""
        for start, stop in prefill_steps(0, len(prompt)):
            yield self._run(prompt[start:stop], states, stop - start)

    def _run(self, tokens: Sequence[int], states: TorchStates, positions: int) -> Logits:
        """The logits after the last tokens, (positions, vocabulary)."""
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([list(tokens)], device=self.device),
                past_key_values=states.cache,
                use_cache=True,
                logits_to_keep=positions,
            )
        logits: Logits = out.logits[0].float().cpu().numpy()
        return logits

    def join(
        self, states: Mapping[int, TorchStates], size: int, former: TorchRows | None
    ) -> TorchRows:
        """See `Decoder`."""
        caches = {number: each.cache for number, each in states.items()}
        return TorchRows(self.model, caches, former)


def _chosen_dtype(folder: Path, dtype: Dtype | None, device: str) -> torch.dtype | str:
    """What transformers is asked for; see `TorchEngine`."""
    if dtype == "bfloat16":
        return torch.bfloat16
    if dtype == "float32":
        return torch.float32
    if device != "cpu":
        return "auto"
    fast = dtype == "auto" and multiplies_bfloat16() and not _is_small(folder)
    return torch.bfloat16 if fast else torch.float32


def _is_small(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return count_weights(folder) <= _SMALL
    # Loading it says what is wrong with the files.
    return True


def _load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """transformers' model; weights that are stored in this precision are mapped, not copied.

    Raises:
        ModelUnavailable: the weights are quantized in a way that cannot run here.
    """
    check_packages(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        if quantization_method(folder) is None:
            raise
        # Its packages and the device are checked in many places, with bare exceptions.
        raise cannot_load(folder, one_line(error)) from None


def _chat_tokenizer(
    folder: Path, tokenizer: Any, configured: int | list[int] | None
) -> ChatTokenizer:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    ends = configured if isinstance(configured, list) else [configured]
    return ChatTokenizer(
        tokenizer.backend_tokenizer,
        read_template(folder) if template is None else template,
        tokenizer.special_tokens_map,
        frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None),
    )


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

"""transformers on torch: folders in the Hugging Face format, safetensors only."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

# Without this, loading a model creates a cache folder, although nothing is compiled.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_sidecar.engines.chat import TOKENIZER_FILE, ChatTokenizer
from llm_sidecar.engines.chat_template import read_template
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.generation import Logits
from llm_sidecar.engines.peft_files import WEIGHTS_FILE, matrix_of, read_config
from llm_sidecar.engines.torch_states import TorchRows, batch_capacity, empty_cache
from llm_sidecar.errors import AdapterRejected, ModelUnavailable, one_line

_ADAPTER: Final = "default"
"""The name of the loaded adapter in PEFT."""


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
            device: `auto` takes CUDA if torch finds it.
            threads: of torch's operators, on CPU.
            adapter: folder of a PEFT LoRA adapter, in safetensors.

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
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if self.device == "cpu" else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).to(self.device)
        self.model.eval()
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

    def forward(self, tokens: Sequence[int], states: TorchStates, keep: int = 1) -> Logits:
        """See `Decoder`."""
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([list(tokens)], device=self.device),
                past_key_values=states.cache,
                use_cache=True,
                # 0 would keep all.
                logits_to_keep=max(keep, 1),
            )
        logits: Logits = out.logits[0].float().cpu().numpy()
        return logits

    def join(
        self, states: Mapping[int, TorchStates], size: int, former: TorchRows | None
    ) -> TorchRows:
        """See `Decoder`."""
        caches = {number: each.cache for number, each in states.items()}
        return TorchRows(self.model, caches, former)


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

"""A language model in a GGUF file: what its header says, or why it cannot be served.

model = read_model(Path("Hermes.Q4_K_M.gguf"))
print(model.architecture, model.context_length)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llm_sidecar.engines.gguf_header import read_header
from llm_sidecar.errors import ModelUnavailable

_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NOT_TEXT: Final = {
    "mmproj": "the image part of a model",
    "adapter": "a LoRA adapter",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary",
}
"""What a file is, by its general.type, if it is not a language model."""
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
"""Types of added tokens, which text is matched against as a whole. The unknown token is not among
them, because plain text may hold characters that the vocabulary lacks."""
_LOOKALIKE: Final = re.compile(r"[_\u2581]?(?:<.+>|\[.+\])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Token:
    """An added token, such as `<|im_end|>`: text that spells it becomes this one token.

    Attributes:
        content: its text.
        special: whether it is a control token; False if plain text may contain it.
    """

    content: str
    special: bool


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What the header of a language model says.

    Attributes:
        files: the file, or all parts of a split model.
        architecture: such as `llama`.
        context_length: the longest text that it was trained on, in tokens.
        vocabulary: number of tokens.
        cache_bytes: bytes of attention states of one token, as float16.
        template: the chat template.
        tokens: the control tokens and the added ones, by number.
        lookalikes: the texts of other tokens that are spelled like control tokens, by number.
        special_tokens: `bos_token` and others, which the template may use.
        bos: the token that begins a text, or None.
    """

    files: tuple[Path, ...]
    architecture: str
    context_length: int
    vocabulary: int
    cache_bytes: int
    template: str
    tokens: Mapping[int, Token]
    lookalikes: Mapping[int, str]
    special_tokens: Mapping[str, str]
    bos: int | None


def read_model(path: Path) -> GgufModel:
    """Reads the header of a language model that chats.

    Raises:
        ModelUnavailable: it cannot be served; says why.
        OSError: it cannot be read.
    """
    files = model_files(path)
    header = read_header(path)
    for other in files[1:]:
        read_header(other)
    try:
        return _model(files, header)
    except (TypeError, ValueError, LookupError, AttributeError):
        # A value has another type than the format says.
        raise ModelUnavailable(f"{path.name} is damaged; download it again") from None


def _model(files: tuple[Path, ...], header: Mapping[str, Any]) -> GgufModel:
    path = files[0]
    if (part := header.get("split.no", 0)) != 0:
        raise ModelUnavailable(
            f"{path.name} is part {part + 1} of {header.get('split.count')} of a split model; "
            "name its first part"
        )
    architecture = _check_text_model(path, header)
    template = header.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template.strip():
        raise ModelUnavailable(
            f"{path.name} has no chat template, so it is a base model; take the model that was "
            "trained for chats, often called Instruct"
        )
    texts: list[str] = header["tokenizer.ggml.tokens"]
    tokens = _control_tokens(header, texts)
    return GgufModel(
        files,
        architecture,
        int(header.get(f"{architecture}.context_length", 0)),
        len(texts),
        _cache_bytes(header, architecture),
        template,
        tokens,
        {n: text for n, text in enumerate(texts) if n not in tokens and _LOOKALIKE.fullmatch(text)},
        _special_tokens(header, texts),
        header.get("tokenizer.ggml.bos_token_id"),
    )


def check_adapter(path: Path, model: GgufModel) -> None:
    """Raises ModelUnavailable unless a file is a LoRA adapter for a model's architecture."""
    header = read_header(path)
    if header.get("general.type") != "adapter" or header.get("adapter.type") != "lora":
        raise ModelUnavailable(f"{path.name} is not a LoRA adapter")
    if (found := header.get("general.architecture")) != model.architecture:
        raise ModelUnavailable(
            f"{path.name} is an adapter for {found}, but the model is a {model.architecture}"
        )


def model_files(path: Path) -> tuple[Path, ...]:
    """All files of a model, of which `path` is the first.

    Raises:
        ModelUnavailable: `path` is a later part, or a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, number, count = match[1], int(match[2]), int(match[3])
    parts = [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if number != 1:
        raise ModelUnavailable(
            f"{path.name} is part {number} of {count} of a split model; "
            f"name its first part, {parts[0].name}"
        )
    for part in parts:
        if not part.is_file():
            raise ModelUnavailable(f"{part.name}, a part of the split model, is missing")
    return tuple(parts)


def _check_text_model(path: Path, header: Mapping[str, Any]) -> str:
    """The architecture of a model that writes text.

    Raises:
        ModelUnavailable: it is another kind of model.
    """
    kind, architecture = header.get("general.type", "model"), header.get("general.architecture")
    what = _NOT_TEXT.get(kind)
    if architecture == "clip":
        what = _NOT_TEXT["mmproj"]
    elif (
        header.get(f"{architecture}.attention.causal") is False
        or f"{architecture}.pooling_type" in header
    ):
        what = "an embedding model"
    elif what is None and not header.get("tokenizer.ggml.tokens"):
        what = "a model without a vocabulary"
    if what is not None:
        raise ModelUnavailable(f"{path.name} is {what}, not a language model")
    return str(architecture)


def _cache_bytes(header: Mapping[str, Any], architecture: str) -> int:
    def value(key: str, default: int = 0) -> Any:
        return header.get(f"{architecture}.{key}", default)

    layers = int(value("block_count"))
    heads = value("attention.head_count")
    per_layer = value("attention.head_count_kv", heads)
    # In some architectures, layers differ in their number of heads.
    kv_heads = sum(per_layer) if isinstance(per_layer, list) else layers * per_layer
    most_heads = max(heads) if isinstance(heads, list) else heads
    size = value("embedding_length") // max(1, most_heads)
    width = value("attention.key_length", size) + value("attention.value_length", size)
    return int(2 * kv_heads * width)


def _control_tokens(header: Mapping[str, Any], texts: list[str]) -> dict[int, Token]:
    types = header.get("tokenizer.ggml.token_type", [])
    return {
        number: Token(text, special=kind == _CONTROL)
        for number, (text, kind) in enumerate(zip(texts, types, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and text
    }


def _special_tokens(header: Mapping[str, Any], texts: list[str]) -> dict[str, str]:
    names = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "sep_token": "seperator",  # spelled so in the format
        "pad_token": "padding",
    }
    found = {}
    for name, key in names.items():
        number = header.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < len(texts):
            found[name] = texts[number]
    return found

"""Small GGUF files with random weights, for tests that must hold whatever the weights say.

    python -m tests.gguf_files shape-7b /tmp/7b.gguf SmolLM2.gguf

writes one with the shape of a 7B model, 4 GB large, that has the tokenizer of another file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType

TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Shape:
    """The size of a Llama."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 128
    context: int = 8192
    type: GGMLQuantizationType = GGMLQuantizationType.F32


SHAPE_7B: Final = Shape(32, 4096, 32, 8, 14336, 32768, GGMLQuantizationType.Q4_0)


def write_gguf(
    path: Path,
    shape: Shape | None = None,
    *,
    template: str | None = TEMPLATE,
    metadata: Mapping[str, object] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    control: TokenType = TokenType.CONTROL,
    tokenizer: Path | None = None,
) -> Path:
    """A Llama with random weights, whose tokens are bytes and the three of `CONTROL`.

    Without a temperature, only a grammar makes it end a text.

    Args:
        template: None for a base model.
        metadata: further values: text, integers or booleans.
        scale: of the weights; with larger ones the model is surer of what it says.
        control: the type of the tokens in `CONTROL`.
        tokenizer: a .gguf file whose tokens to take instead, of byte-level BPE.
    """
    shape = shape or Shape()
    writer = GGUFWriter(path, "llama", use_temp_file=shape == SHAPE_7B)
    writer.add_type("model")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    tokens = _add_vocabulary(writer, control) if tokenizer is None else _copy(writer, tokenizer)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    _add_tensors(writer, shape, tokens, seed, scale)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_adapter(path: Path, shape: Shape | None = None, *, seed: int = 1) -> Path:
    """A LoRA adapter of `write_gguf`'s model, of rank 2, for the queries of each layer."""
    shape = shape or Shape()
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 64.0)
    random = np.random.default_rng(seed)
    for layer in range(shape.layers):
        for name, columns, rows in (
            (f"blk.{layer}.attn_q.weight.lora_a", shape.width, 2),
            (f"blk.{layer}.attn_q.weight.lora_b", 2, shape.width),
        ):
            writer.add_tensor(name, random.standard_normal((rows, columns), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case _:
            writer.add_string(key, str(value))


def _add_vocabulary(writer: GGUFWriter, control: TokenType) -> int:
    """Adds the tokens; returns how many there are."""
    texts = [*CONTROL, *_byte_letters()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    kinds = [control] * len(CONTROL) + [TokenType.NORMAL] * 256
    writer.add_token_types(kinds)
    # llama.cpp wants one.
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    return len(texts)


def _copy(writer: GGUFWriter, tokenizer: Path) -> int:
    """Adds the tokens of another file; returns how many there are."""
    found = {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in GGUFReader(tokenizer).fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    writer.add_tokenizer_model(found["model"])
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(found["tokens"])
    writer.add_token_types(found["token_type"])
    writer.add_token_merges(found["merges"])
    writer.add_bos_token_id(found["bos_token_id"])
    writer.add_eos_token_id(found["eos_token_id"])
    writer.add_add_bos_token(found.get("add_bos_token", False))
    return len(found["tokens"])


def _byte_letters() -> list[str]:
    """The letter of each byte in byte-level BPE, as GPT-2 has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _add_tensors(writer: GGUFWriter, shape: Shape, tokens: int, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    kv_width = shape.width // shape.heads * shape.kv_heads

    def matrix(name: str, rows: int, columns: int) -> None:
        if shape.type == GGMLQuantizationType.F32:
            weights = random.standard_normal((rows, columns), np.float32)
            if name == "output.weight":
                # It never ends a text by itself.
                weights[: len(CONTROL)] = 0.0
            writer.add_tensor(name, weights * np.float32(scale / columns**0.5))
        else:
            writer.add_tensor(name, _blocks(random, rows, columns), raw_dtype=shape.type)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.width, np.float32))

    matrix("token_embd.weight", tokens, shape.width)
    matrix("output.weight", tokens, shape.width)
    norm("output_norm.weight")
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.attn_q.weight", shape.width, shape.width)
        matrix(f"{block}.attn_k.weight", kv_width, shape.width)
        matrix(f"{block}.attn_v.weight", kv_width, shape.width)
        matrix(f"{block}.attn_output.weight", shape.width, shape.width)
        matrix(f"{block}.ffn_gate.weight", shape.hidden, shape.width)
        matrix(f"{block}.ffn_up.weight", shape.hidden, shape.width)
        matrix(f"{block}.ffn_down.weight", shape.width, shape.hidden)


def _blocks(random: np.random.Generator, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Random Q4_0 blocks: a small scale as float16, then 32 values of four bits."""
    size, count = 18, columns // 32
    found = random.integers(0, 256, (rows, count, size), np.uint8)
    found[..., :2] = np.full(1, 0.1 / columns**0.5, np.float16).view(np.uint8)
    return found.reshape(rows, count * size)


def main(arguments: Sequence[str]) -> None:
    """Writes the file of a 7B model."""
    if arguments[:1] != ["shape-7b"] or len(arguments) != 3:
        sys.exit(__doc__)
    write_gguf(Path(arguments[1]), SHAPE_7B, tokenizer=Path(arguments[2]))


if __name__ == "__main__":
    main(sys.argv[1:])

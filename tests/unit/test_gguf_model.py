"""Headers of GGUF files, written byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.engines.gguf_model import GgufModel, Token, check_adapter, read_model
from llm_sidecar.errors import ModelUnavailable

TOKENS = ["<unk>", "<s>", "<|end|>", "a", "<tool>"]
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.type": "model",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 4],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_of(value: Any) -> bytes:
    """A type and its value."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case _:
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def content(metadata: dict[str, Any], version: int = 3, tensor_type: int = 0) -> bytes:
    """A file with one tensor of 64 values."""
    header = b"GGUF" + struct.pack("<IQQ", version, 1, len(metadata))
    for key, value in metadata.items():
        header += text(key) + value_of(value)
    header += text("a.weight") + struct.pack("<IQIQ", 1, 64, tensor_type, 0)
    size = {0: 256, 2: 36, 8: 68}[tensor_type]
    return header + bytes(-len(header) % 32) + bytes(size)


def write(folder: Path, name: str = "m.gguf", **metadata: Any) -> Path:
    """A file with these values; None removes one. Double underscores stand for dots."""
    changed = {key.replace("__", "."): value for key, value in metadata.items()}
    all_values = {**METADATA, **changed}
    path = folder / name
    path.write_bytes(content({k: v for k, v in all_values.items() if v is not None}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelUnavailable) as raised:
        read_model(path)
    return raised.value.detail


def test_a_header_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert read_model(path) == GgufModel(
        files=(path,),
        architecture="llama",
        context_length=4096,
        vocabulary=5,
        # two layers, two heads, keys and values of 16 numbers, two bytes each
        cache_bytes=2 * 2 * (16 + 16) * 2,
        template="{{ messages[0].content }}",
        tokens={
            1: Token("<s>", special=True),
            2: Token("<|end|>", special=True),
            4: Token("<tool>", special=False),
        },
        lookalikes={0: "<unk>"},
        special_tokens={"bos_token": "<s>", "eos_token": "<|end|>"},
        bos=1,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", [1, 2]),
        ("llama.block_count", "two"),
        ("llama.attention.head_count", "four"),
        ("llama.context_length", [4096]),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.tokens", 5),
        ("tokenizer.ggml.token_type", 3),
        ("split.no", "one"),
    ],
)
def test_a_value_of_another_type_is_damage(tmp_path: Path, key: str, value: Any) -> None:
    assert refusal(write(tmp_path, **{key: value})) == "m.gguf is damaged; download it again"


def test_a_tensor_of_many_dimensions_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path)
    before, name, after = path.read_bytes().partition(text("a.weight"))
    path.write_bytes(before + name + struct.pack("<I", 5) + after[4:])
    assert refusal(path) == "m.gguf is damaged; download it again"


def test_the_size_of_states_follows_the_heads_of_each_layer(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        llama__attention__head_count_kv=[1, 3],
        llama__attention__key_length=10,
        llama__attention__value_length=6,
    )
    assert read_model(path).cache_bytes == (1 + 3) * (10 + 6) * 2


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 a zip")
    assert refusal(path) == "m.gguf is not a GGUF file"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    assert refusal(path) == "m.gguf is not a GGUF file"


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, part: float) -> None:
    whole = content(METADATA)
    cut = max(5, int(len(whole) * part))
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:cut])
    assert refusal(path) == f"m.gguf is cut off after {cut} bytes; download it again"


@pytest.mark.parametrize("tensor_type", [0, 2, 8])
def test_the_last_tensor_counts(tmp_path: Path, tensor_type: int) -> None:
    path = tmp_path / "m.gguf"
    whole = content(METADATA, tensor_type=tensor_type)
    path.write_bytes(whole)
    assert read_model(path).vocabulary == 5
    path.write_bytes(whole[:-1])
    assert "is cut off" in refusal(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        content(METADATA).replace(
            b"general.type" + struct.pack("<I", 8), b"general.type" + struct.pack("<I", 99)
        )
    )
    assert refusal(path) == "m.gguf is damaged; download it again"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (1, "has version 1 of GGUF, and versions 2 and 3 can be read; convert it again"),
        (4, "has version 4 of GGUF, and versions 2 and 3 can be read; convert it again"),
        (3 << 24, "is a GGUF file for big-endian processors"),
    ],
)
def test_another_version_is_refused(tmp_path: Path, version: int, reason: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content(METADATA, version))
    assert refusal(path) == f"m.gguf {reason}"


def test_a_base_model_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, tokenizer__chat_template=None)) == (
        "m.gguf has no chat template, so it is a base model; take the model that was trained for "
        "chats, often called Instruct"
    )


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"general__type": "mmproj"}, "the image part of a model"),
        ({"general__architecture": "clip"}, "the image part of a model"),
        ({"general__type": "adapter"}, "a LoRA adapter"),
        ({"general__type": "imatrix"}, "an importance matrix"),
        ({"llama__attention__causal": False}, "an embedding model"),
        ({"llama__pooling_type": 1}, "an embedding model"),
        ({"tokenizer__ggml__tokens": None}, "a model without a vocabulary"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, metadata: dict[str, Any], what: str
) -> None:
    assert refusal(write(tmp_path, **metadata)) == f"m.gguf is {what}, not a language model"


def test_the_first_part_of_a_split_model_is_enough(tmp_path: Path) -> None:
    first = write(tmp_path, "m-00001-of-00002.gguf", split__no=0, split__count=2)
    second = write(tmp_path, "m-00002-of-00002.gguf", split__no=1, split__count=2)
    assert read_model(first).files == (first, second)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, "m-00001-of-00003.gguf", split__no=0, split__count=3)
    write(tmp_path, "m-00003-of-00003.gguf")
    assert refusal(first) == "m-00002-of-00003.gguf, a part of the split model, is missing"


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, "m-00001-of-00002.gguf", split__no=0, split__count=2)
    second = write(tmp_path, "m-00002-of-00002.gguf")
    second.write_bytes(second.read_bytes()[:-1])
    assert refusal(first).startswith("m-00002-of-00002.gguf is cut off")


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "m-00002-of-00003.gguf")) == (
        "m-00002-of-00003.gguf is part 2 of 3 of a split model; name its first part, "
        "m-00001-of-00003.gguf"
    )


def test_a_renamed_later_part_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, split__no=1, split__count=3)) == (
        "m.gguf is part 2 of 3 of a split model; name its first part"
    )


def test_an_adapter_fits_the_model(tmp_path: Path) -> None:
    model = read_model(write(tmp_path))
    adapter = write(tmp_path, "a.gguf", general__type="adapter", adapter__type="lora")
    check_adapter(adapter, model)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "a.gguf is not a LoRA adapter"),
        ({"general__type": "adapter", "adapter__type": "other"}, "a.gguf is not a LoRA adapter"),
        (
            {
                "general__type": "adapter",
                "adapter__type": "lora",
                "general__architecture": "phi3",
            },
            "a.gguf is an adapter for phi3, but the model is a llama",
        ),
    ],
)
def test_another_adapter_is_refused(tmp_path: Path, metadata: dict[str, Any], reason: str) -> None:
    model = read_model(write(tmp_path))
    with pytest.raises(ModelUnavailable) as raised:
        check_adapter(write(tmp_path, "a.gguf", **metadata), model)
    assert raised.value.detail == reason

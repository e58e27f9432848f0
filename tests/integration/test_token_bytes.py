"""The bytes of tokens in each kind of vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from llm_sidecar.engines.token_bytes import TokenBytes
from llm_sidecar.models.files import DEMO_DIR
from tests.layout_tokenizers import GPT2, bytes_tokenizer

TEXTS = ("Long ABC, 12.5 %.", "  two spaces\n\ttab", "価格🚀é", "a\x00b\x7f\xad", "<0x41> Ġ▁")


def pieces(*more: str) -> Any:
    """A vocabulary of pieces with a token for each byte, as SentencePiece writes it."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é", *more]
    model = models.BPE(
        {name: number for number, name in enumerate(names)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_join_to_their_text(text: str) -> None:
    tokenizer = bytes_tokenizer(GPT2)
    data = TokenBytes(tokenizer)
    ids = tokenizer.encode(text).ids
    assert b"".join(map(data, ids)) == text.encode()


@pytest.mark.parametrize("model", ["phi3", "hermes"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_the_demo_join_to_their_text(model: str, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / model / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(TokenBytes(tokenizer), ids)) == text.encode()


def test_each_byte_of_a_byte_level_vocabulary_is_itself() -> None:
    tokenizer = bytes_tokenizer(GPT2)
    data = TokenBytes(tokenizer)
    single = [data(token) for token in tokenizer.get_vocab().values()]
    assert {found for found in single if len(found) == 1} == {bytes([n]) for n in range(256)}


def test_pieces_have_spaces_and_single_bytes() -> None:
    tokenizer = pieces()
    data, vocabulary = TokenBytes(tokenizer), tokenizer.get_vocab()
    names = ("▁a", "▁", "é", "<0x0A>", "<0xF0>", "<unk>")
    found = [data(vocabulary[name]) for name in names]
    assert found == [b" a", b" ", "é".encode(), b"\n", b"\xf0", b"<unk>"]


def test_a_vocabulary_without_byte_tokens_spells_them(tmp_path: Path) -> None:
    tokenizer = pieces()
    tokenizer.decoder = decoders.Metaspace()
    data, vocabulary = TokenBytes(tokenizer), tokenizer.get_vocab()
    assert (data(vocabulary["<0x0A>"]), data(vocabulary["▁a"])) == (b"<0x0A>", b" a")


def test_a_tokenizer_without_a_decoder_has_its_tokens_as_they_are() -> None:
    tokenizer = pieces()
    tokenizer.decoder = None
    assert TokenBytes(tokenizer)(tokenizer.token_to_id("▁a")) == "▁a".encode()


def test_added_tokens_are_spelled_as_in_the_text() -> None:
    tokenizer = bytes_tokenizer(GPT2)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("  Ġ", normalized=False)])
    data = TokenBytes(tokenizer)
    found = [data(tokenizer.token_to_id(name)) for name in ("<|end|>", "  Ġ")]
    assert found == [b"<|end|>", "  Ġ".encode()]


def test_an_id_beyond_the_vocabulary_has_no_bytes() -> None:
    assert TokenBytes(pieces())(1 << 20) == b""

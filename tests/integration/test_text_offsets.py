"""Offsets of tokens, with a tokenizer that begins prompts with BOS and a space, as Llama 2's."""

from __future__ import annotations

import pytest

from llm_sidecar.engines.token_bytes import TokenBytes
from llm_sidecar.models.base import TokenLogprob
from llm_sidecar.services.conversation import TextPart
from osiris.openai.logprobs import LegacyLogprobs
from tests.layout_tokenizers import sentencepiece_tokenizer

TEXTS = ("Long ABC from 100, now 112.5.", " Score it.", "  two\n\ttabs", "価格🚀é Long", "a\xadb")


@pytest.mark.parametrize("text", TEXTS)
def test_each_token_begins_at_its_offset(text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    data = TokenBytes(tokenizer)
    ids = [tokenizer.token_to_id("<s>"), *tokenizer.encode(text, add_special_tokens=False).ids]
    logprobs = tuple(TokenLogprob(token, data(token), -0.5) for token in ids)
    found = LegacyLogprobs().of(text, TextPart("", (), logprobs))
    tokens, offsets = found["tokens"], found["text_offset"]
    # BOS is not in the text, and neither is the space before the first token.
    assert (tokens[0], offsets[:2]) == ("<s>", [0, 0])
    assert (" " + text).startswith(tokens[1])
    whole = [pair for pair in zip(tokens[2:], offsets[2:], strict=True) if "bytes:" not in pair[0]]
    for token, offset in whole:
        assert text[offset:].startswith(token)
    assert whole

"""Small tokenizers of the kinds that well-known models have, for `model_layouts`."""

from __future__ import annotations

import json
from typing import Any, Final

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_CORPUS: Final = [
    "Market context: Long ABC from 100, now 112.5, RSI 81. Proposal: adjust the stop.",
    '{"ticker":"ABC","action":"adjust","side":"LONG","new_stop_pct":2.5,"confidence":0.72}',
    "Score it from 0 to 10, a number only. You are Hermes, the risk officer of a trading desk.",
    "system user assistant model Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    " ".join(str(number) for number in range(200)),
    "ASSISTANT: 7 ASSISTANT: 10 USER: 3 ### Response: 9",
] * 3


BYTES: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen splits text: digits one by one."""
BYTES3: Final = BYTES.replace(r"\p{N}|", r"\p{N}{1,3}|")
"""How Llama 3 splits text: up to three digits in a token."""
GPT2: Final = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 splits text: a space belongs to the number behind it."""


def bytes_tokenizer(pattern: str) -> Any:
    """A byte-level tokenizer that splits text by this pattern."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def _pieces(*special: str) -> Any:
    """A model of pieces with byte fallback, digits one by one; `▁` stands for a space."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    learned.train_from_iterator(_CORPUS, trainer)
    written = json.loads(learned.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *written["vocab"]]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in written["merges"]]
    return models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def sentencepiece_tokenizer() -> Any:
    """A tokenizer like that of Llama 2, Mistral and Phi-3."""
    backend = Tokenizer(_pieces("<unk>", "<s>", "</s>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def gemma_tokenizer() -> Any:
    """A tokenizer like that of Gemma 2."""
    backend = Tokenizer(_pieces("<pad>", "<eos>", "<bos>", "<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    return backend

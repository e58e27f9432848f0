"""The demo models' tokenizers: byte-level BPE that splits capitals and digits or numbers.

With a token for each capital, a ticker is copied character by character, which a tiny model learns
soon. A capital that begins a word, and frequent words in capitals such as RSI, are not split, so
that single letters are mostly tickers. Phi-3 copies numbers, so each digit is a token. Hermes
computes with them, so a number with one decimal is one token, with one embedding. Bytes cover any
Unicode text, so every prompt can be encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

CONTEXT_LENGTH: Final = 8192
_OFTEN: Final = 200
"""Repeats of a word in the training texts that make it one token."""
DIGITS: Final = r"\d"
NUMBERS: Final = r"\d{1,2}\.\d|10(?!\d)|\d"
"""Patterns of what is split off besides capitals: digits, or numbers with one decimal."""
_CAPITALS: Final = r"[A-Z](?![a-z])"
_BETWEEN: Final = r" ?[^\sA-Za-z\d]+|\s+"
_WORDS: Final = rf" ?[A-Z]?[a-z]+|{_BETWEEN}"
"""Pairs are merged only within these matches. onnxruntime-genai uses the patterns too, without
lookbehind; with GPT-2's own pattern it splits three of a hundred prompts differently."""
_CAPITALS_TOGETHER: Final = r"[A-Z]+(?![a-z])"
"""Splits a whole word from the character before it. The first pattern matches both at once, because
a ticker may end like such a word; in a chat some character always comes before."""


class ChatFormat(NamedTuple):
    """How a model family writes a chat.

    Attributes:
        template: Jinja template over `messages` and `add_generation_prompt`.
        special: special tokens, the padding token first.
        end: the special token that ends a turn.
    """

    template: str
    special: tuple[str, ...]
    end: str


PHI3: Final = ChatFormat(
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|end|>",
)
CHATML: Final = ChatFormat(
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)


def train_tokenizer(
    texts: Iterable[str],
    chat: ChatFormat,
    vocabulary: int,
    *,
    apart: str = DIGITS,
    whole: Sequence[str] = (),
) -> Any:
    """A transformers tokenizer of at most `vocabulary` tokens, trained on `texts`.

    Args:
        texts: training texts.
        chat: chat format of the model family.
        vocabulary: largest number of tokens.
        apart: `DIGITS` or `NUMBERS`.
        whole: words in capitals that are one token where they stand alone.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    patterns = ["|".join((_CAPITALS, apart, _WORDS))]
    if whole:
        recurring = "|".join(sorted(whole, key=len, reverse=True))
        patterns = [
            rf"(?:{_BETWEEN})(?:{recurring})(?![A-Za-z\d])|{patterns[0]}",
            _CAPITALS_TOGETHER,
        ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(chat.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Frequent enough that each becomes one token.
    recurring_texts = [f" {word}" for word in whole]
    seen = itertools.chain(texts, itertools.chain.from_iterable([recurring_texts] * _OFTEN))
    backend.train_from_iterator(seen, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=chat.special[0],
        eos_token=chat.end,
        additional_special_tokens=[t for t in chat.special[1:] if t != chat.end],
        chat_template=chat.template,
        model_max_length=CONTEXT_LENGTH,
    )

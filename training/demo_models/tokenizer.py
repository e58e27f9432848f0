"""The demo models' tokenizers: byte-level BPE that keeps capitals, and digits or numbers, apart.

Kept apart, a ticker is copied character by character, which a tiny model learns soon; a capital that
begins a word, and a word in capitals that recurs, such as RSI, stay whole, so that letters that
stand alone are mostly tickers. Where numbers are to be copied, each digit is a token; where they
are to be reckoned with, a number with one decimal is one token, so that its size is a single
embedding. Any Unicode text is some bytes, so every prompt can be encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

CONTEXT_LENGTH: Final = 8192
_OFTEN: Final = 200
DIGITS: Final = r"\d"
NUMBERS: Final = r"\d{1,2}\.\d|10(?!\d)|\d"
"""What is kept apart beside capitals: digits, or numbers of one decimal."""
_CAPITALS: Final = r"[A-Z](?![a-z])"
_BETWEEN: Final = r" ?[^\sA-Za-z\d]+|\s+"
_WORDS: Final = rf" ?[A-Z]?[a-z]+|{_BETWEEN}"
"""Within what pairs are merged elsewhere. onnxruntime-genai reads these patterns too, and it knows
no lookbehind; its reading of GPT-2's own pattern splits three prompts of a hundred otherwise."""
_CAPITALS_TOGETHER: Final = r"[A-Z]+(?![a-z])"
"""Takes a word that stays whole from what is before it. It is found together with that, since a
ticker may end like such a word; in its chat, a message has always something before it."""


class ChatFormat(NamedTuple):
    """How a model family writes a chat.

    Attributes:
        template: Jinja template over `messages` and `add_generation_prompt`.
        special: its special tokens, the padding token first.
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
        apart: `DIGITS` or `NUMBERS`.
        whole: words in capitals that stay whole where they stand alone.
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
    # Often enough that each becomes one token.
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

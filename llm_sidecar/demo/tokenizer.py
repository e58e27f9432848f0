"""The demo models' tokenizers: byte-level BPE that keeps every capital letter and digit apart.

Kept apart, a ticker is copied and a number read character by character, which a tiny model learns
soon; any Unicode text is some bytes, so every prompt can be encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

CONTEXT_LENGTH: Final = 8192
_ISOLATED: Final = r"[A-Z]|\d"


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


def train_tokenizer(texts: Iterable[str], chat: ChatFormat, vocabulary: int) -> Any:
    """A transformers tokenizer of at most `vocabulary` tokens, trained on `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_ISOLATED), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(chat.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=chat.special[0],
        eos_token=chat.end,
        additional_special_tokens=[t for t in chat.special[1:] if t != chat.end],
        chat_template=chat.template,
        model_max_length=CONTEXT_LENGTH,
    )

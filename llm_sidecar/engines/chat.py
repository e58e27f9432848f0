"""Chats as tokens, by Hugging Face's `tokenizers` and the model's chat template.

    chat = ChatTokenizer.from_folder(folder, ends=frozenset({4}))
    prompt = chat.encode([{"role": "user", "content": "Hi."}])

Encoding and decoding may run in different threads: encoding changes no state and releases the GIL.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from llm_sidecar.engines.base import GenerationRequest, Message, check_context
from llm_sidecar.engines.chat_template import ChatTemplate, read_special_tokens, read_template
from llm_sidecar.engines.choice_tree import ChoiceTree
from llm_sidecar.engines.control_tokens import ControlTokens
from llm_sidecar.errors import InvalidRequest, ModelUnavailable

# A thread pool does not make a single text faster.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

T = TypeVar("T")

TOKENIZER_FILE: Final = "tokenizer.json"

_TEMPLATE_SECONDS: Final = 10.0
"""Time limit for rendering a few short chats on loading; normally it takes about a millisecond."""
_ATTEMPTS: Final = 3
"""Attempts to encode a chat; two are enough unless a control token begins inside another."""
_SLICE: Final = 1 << 15
"""Characters of a long text whose tokens are counted at a time."""
_CUT_TOKENS: Final = 64
"""An upper bound of the tokens that cutting a text in two adds."""
_CACHED_CHATS: Final = 64
_LONGEST_CHARACTER: Final = 8
"""More tokens than any character takes: a character has at most four bytes in UTF-8."""
_KNOWN_CHATS: Final = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)

_Shape = tuple[tuple[str, str], ...]
"""The role of each message, and a placeholder for its content: a letter, a space or nothing."""


class ChatTokenizer:
    """A model's tokenizer and chat template.

    No message can write a control token: one that it spells is escaped with a space. The result is
    then checked, because a normalizer or the template may change the text: the chat must have
    exactly the control tokens of a chat with the same roles and placeholder contents.

    Attributes:
        tokenizer: of the `tokenizers` package.
        ends: tokens that end a turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        special_tokens: Mapping[str, str],
        ends: frozenset[int],
    ) -> None:
        """Compiles the template and tries it.

        Args:
            tokenizer: of the `tokenizers` package; do not change it afterwards.
            template: source of the chat template.
            special_tokens: tokens that the template may use, by names such as `bos_token`.
            ends: tokens that end a turn.

        Raises:
            ModelUnavailable: the template is not valid, refuses every chat or takes too long.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        self.tokenizer = tokenizer
        self.ends = ends
        self._frame = functools.lru_cache(_CACHED_CHATS)(self._control_tokens_of)
        self._choice_tree = functools.lru_cache(_CACHED_CHATS)(self._new_choice_tree)
        try:
            self._template, written = _within(
                _TEMPLATE_SECONDS, lambda: self._try(template, special_tokens)
            )
        except TimeoutError:
            raise ModelUnavailable(
                f"the model's chat template takes longer than {_TEMPLATE_SECONDS:g} s for a short "
                "chat; set another template in the model's folder"
            ) from None
        self._control = ControlTokens(tokenizer, self._template.literals, written)

    @classmethod
    def from_folder(cls, folder: Path, ends: frozenset[int]) -> ChatTokenizer:
        """Reads the tokenizer and the template from a model's folder.

        Raises:
            ModelUnavailable: one of them is missing or broken.
        """
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise ModelUnavailable(
                f"{folder} has no {TOKENIZER_FILE}; save the original model's tokenizer there with "
                "transformers: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the package raises bare ones
            raise ModelUnavailable(
                f"{file} cannot be read ({error}); copy it again from the original model"
            ) from None
        return cls(tokenizer, read_template(folder), read_special_tokens(folder), ends)

    def encode(
        self, messages: Sequence[Message], header: bool = True, limit: int | None = None
    ) -> list[int]:
        """The chat's tokens, with the header of the assistant's turn or without.

        Args:
            limit: the approximate maximum number of tokens; a far longer text is refused early.

        Raises:
            InvalidRequest: the text has too many tokens, or a message contains control tokens that
                cannot be escaped, or half a surrogate pair.
            ModelUnavailable: the template refuses the chat.
        """
        shape = tuple((one["role"], _placeholder(one["content"])) for one in messages)
        for _ in range(_ATTEMPTS):
            tokens = self._tokens(self._template.render(messages, header), limit)
            if self._control.filter(tokens) == self._frame(shape, header):
                return tokens
            if limit is not None and len(tokens) > limit:
                raise _too_long(limit)
            escaped = [{**one, "content": self._control.escape(one["content"])} for one in messages]
            if escaped == list(messages):
                break
            messages = escaped
        raise InvalidRequest(
            "prompt: it holds control tokens of the model that cannot be read as text; remove them"
        )

    def prompt(
        self, request: GenerationRequest, context_length: int, header: bool = True
    ) -> list[int]:
        """See `Engine.tokenize`."""
        if request.tokens is not None:
            return list(request.tokens)
        tokens = self.encode(request.messages, header, context_length)
        check_context(len(tokens), request.max_tokens, context_length)
        return tokens

    def decoder(self) -> TextDecoder:
        """A new decoder, for one completion."""
        return TextDecoder(self.tokenizer)

    def choice_tree(self, choices: tuple[str, ...]) -> ChoiceTree:
        """The tokens of each choice at the start of the assistant's turn."""
        return self._choice_tree(choices)

    def _new_choice_tree(self, choices: tuple[str, ...]) -> ChoiceTree:
        chat = self._template.render([{"role": "user", "content": "?"}])
        skip = len(self._tokens(chat))
        return ChoiceTree({choice: self._tokens(chat + choice)[skip:] for choice in choices})

    def _try(self, source: str, special_tokens: Mapping[str, str]) -> tuple[ChatTemplate, set[int]]:
        """Compiles the template; also returns the tokens that it writes for the known chats."""
        template = ChatTemplate(source, special_tokens)
        written: set[int] = set()
        refused: ModelUnavailable | None = None
        for roles in _KNOWN_CHATS:
            try:
                text = template.render([{"role": role, "content": "x"} for role in roles])
            except ModelUnavailable as error:
                refused = error
            else:
                written.update(self._tokens(text))
        if not written and refused is not None:
            raise refused
        return template, written

    def _tokens(self, text: str, limit: int | None = None) -> list[int]:
        if limit is not None and len(text) > 2 * _SLICE:
            # Stops as soon as the text cannot fit the context, however long it is.
            counted = 0
            for start in range(0, len(text), _SLICE):
                counted += len(self._ids(text[start : start + _SLICE])) - _CUT_TOKENS
                if counted > limit:
                    raise _too_long(limit)
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        try:
            # `encode` holds the GIL, so other threads would wait.
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            raise InvalidRequest(
                "prompt: it holds half of a surrogate pair; send Unicode text"
            ) from None
        ids: list[int] = encoding.ids
        return ids

    def _control_tokens_of(self, shape: _Shape, header: bool) -> list[int]:
        """The control tokens of a chat with these roles, whose contents have none."""
        messages = [{"role": role, "content": content} for role, content in shape]
        return self._control.filter(self._tokens(self._template.render(messages, header)))


def _placeholder(content: str) -> str:
    return "x" if content.strip() else content[:1]


def _too_long(limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"prompt: it takes more tokens than the model's context of {limit}; shorten it"
    )


def end_tokens(model: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end a turn, by the `model` part of a genai_config.json."""
    configured = model.get("eos_token_id")
    return frozenset(configured if isinstance(configured, list) else [configured]) - {None}


class TextDecoder:
    """Decodes a completion token by token."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: of the `tokenizers` package."""
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def __call__(self, token: int) -> str:
        try:
            text: str = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the package raises bare ones
            # A byte-level decoder fails on invalid UTF-8, and cannot continue.
            self._begin()
            return "\N{REPLACEMENT CHARACTER}"
        self._pending.append(token)
        if not text and len(self._pending) == _LONGEST_CHARACTER:
            # After invalid UTF-8, the stream would decode the whole text again at every step.
            text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._begin()
        elif text:
            self._pending.clear()
        return text


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Returns what `work` returns; raises TimeoutError if it takes longer.

    The work then continues in a daemon thread.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the caller receives it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)

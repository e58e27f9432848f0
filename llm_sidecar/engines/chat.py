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

from llm_sidecar.engines.base import GenerationRequest, Message
from llm_sidecar.engines.chat_layout import ChatLayout
from llm_sidecar.engines.chat_template import ChatTemplate, read_special_tokens, read_template
from llm_sidecar.engines.choice_tree import ChoiceTree, shared_length
from llm_sidecar.engines.context import check_context
from llm_sidecar.engines.control_tokens import ControlTokens
from llm_sidecar.engines.text_decoder import TextDecoder
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

_Shape = tuple[tuple[str, str], ...]
"""The role of each message, and a placeholder for its content: a letter, a space or nothing."""


class ChatTokenizer:
    """A model's tokenizer and chat template.

    No message can write a control token: one that it spells is escaped with a space. The result is
    then checked, because a normalizer or the template may change the text: the chat must have
    exactly the control tokens of a chat with the same roles and placeholder contents.

    Attributes:
        tokenizer: of the `tokenizers` package.
        ends: tokens that end a turn, including the one that the template writes.
        notes: where chats deviate from the template, one sentence each.
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
            ModelUnavailable: the template is not valid, cannot write the sidecar's chats or takes
                too long.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        self.tokenizer = tokenizer
        self._frame = functools.lru_cache(_CACHED_CHATS)(self._control_tokens_of)
        self._tree_of_end = functools.lru_cache(_CACHED_CHATS)(self._new_tree_of_end)
        try:
            self._layout = _within(
                _TEMPLATE_SECONDS, lambda: ChatLayout(ChatTemplate(template, special_tokens))
            )
        except TimeoutError:
            raise ModelUnavailable(
                f"the model's chat template takes longer than {_TEMPLATE_SECONDS:g} s for a short "
                "chat; set another template in the model's folder"
            ) from None
        self.notes = self._layout.notes
        written = {token for prompt in self._layout.prompts for token in self._ids(prompt)}
        self._control = ControlTokens(tokenizer, self._layout.literals, written)
        self.ends = ends | set(self._control.filter(self._ids(self._layout.turn_end.lstrip())[:1]))
        self._end = self._control.from_last(self._layout.header)

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

    def encode(self, messages: Sequence[Message], limit: int | None = None) -> list[int]:
        """The tokens of the prompt for the assistant's next turn, or for the rest of the last turn
        if that is the assistant's.

        Args:
            limit: the approximate maximum number of tokens; a far longer text is refused early.

        Raises:
            InvalidRequest: the text has too many tokens, or a message contains control tokens that
                cannot be escaped, or half a surrogate pair.
            ModelUnavailable: the template refuses the chat.
        """
        return self._encode(messages, limit)[1]

    def encode_prefix(self, messages: Sequence[Message], limit: int | None = None) -> list[int]:
        """The common prefix of prompts with these messages and a further user turn, as tokens.

        It is what two such prompts share; another prompt may differ in its last tokens. The
        messages alone cannot be encoded: some templates refuse a chat without a user turn, and
        some end it differently.

        Raises:
            InvalidRequest, ModelUnavailable: as in `encode`.
        """
        one, other = (
            self.encode([*messages, {"role": "user", "content": text}], limit) for text in "A7"
        )
        return one[: shared_length(one, other)]

    def encode_text(self, text: str, limit: int | None = None) -> list[int]:
        """The tokens of a text without the chat template, after those that begin every text of the
        tokenizer (BOS).

        Raises:
            InvalidRequest: as in `encode`.
        """
        for _ in range(_ATTEMPTS):
            tokens = self._tokens(text, limit)
            if not self._control.filter(tokens):
                return [*self._begin, *tokens]
            text = self._control.escape(text)
        raise _unescapable()

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """Raises InvalidRequest unless the vocabulary has these tokens."""
        ids = list(tokens)
        if not self._known.issuperset(ids):
            raise InvalidRequest("the model has no token with one of these ids", field="prompt")
        return ids

    @functools.cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_vocab().values())

    @functools.cached_property
    def _begin(self) -> list[int]:
        """The tokens that the tokenizer puts before a text."""
        (encoding,) = self.tokenizer.encode_batch_fast(["x"], add_special_tokens=True)
        plain = self._ids("x")
        ids: list[int] = encoding.ids
        return next(
            (ids[:start] for start in range(len(ids)) if ids[start : start + len(plain)] == plain),
            [],
        )

    def _encode(
        self, messages: Sequence[Message], limit: int | None = None
    ) -> tuple[str, list[int]]:
        """The prompt as text, with control tokens escaped, and its tokens."""
        shape = tuple((one["role"], _placeholder(one["content"])) for one in messages)
        for _ in range(_ATTEMPTS):
            text = self._layout.render(messages)
            tokens = self._tokens(text, limit)
            if self._control.filter(tokens) == self._frame(shape):
                return text, tokens
            if limit is not None and len(tokens) > limit:
                raise _too_long(limit)
            escaped = [{**one, "content": self._control.escape(one["content"])} for one in messages]
            if escaped == list(messages):
                break
            messages = escaped
        raise _unescapable()

    def prompt(
        self, request: GenerationRequest, context_length: int, header: bool = True
    ) -> list[int]:
        """See `Engine.tokenize`."""
        if request.tokens is not None:
            is_prompt = not request.messages and request.text is None
            tokens = self._checked(request.tokens) if is_prompt else list(request.tokens)
        elif request.text is not None:
            tokens = self.encode_text(request.text, context_length)
        else:
            encode = self.encode if header else self.encode_prefix
            tokens = encode(request.messages, context_length)
        if not tokens:
            raise InvalidRequest("it is empty; send at least one character", field="prompt")
        check_context(len(tokens), request.most_tokens(len(tokens), context_length), context_length)
        return tokens

    def decoder(self, request: GenerationRequest, prompt: Sequence[int]) -> TextDecoder:
        """A new decoder, for the completion of a request with this prompt."""
        # The completion continues a text, or a last turn of the assistant's.
        continues = not request.messages or request.messages[-1]["role"] == "assistant"
        return TextDecoder(self.tokenizer, prompt if continues else ())

    def choice_tree(
        self, messages: Sequence[Message], prompt: Sequence[int], choices: tuple[str, ...]
    ) -> ChoiceTree:
        """The tokens of each choice as the assistant's turn.

        Args:
            prompt: the tokens of the messages.

        Raises:
            InvalidRequest, ModelUnavailable: as in `encode`.
        """
        start = self._layout.answer_start(messages)
        # Control tokens are encoded apart from the text around them. So the text after the last
        # one has the same tokens in every prompt, and one tree serves all of them.
        if self._end:
            tokens, tree = self._tree_of_end(start, choices)
            if list(prompt[-len(tokens) :]) == tokens:
                return tree
        return self._new_tree(*self._encode(messages), start, choices)

    def _new_tree_of_end(
        self, start: str, choices: tuple[str, ...]
    ) -> tuple[list[int], ChoiceTree]:
        """The last tokens of a prompt, and the tree after them."""
        text = self._end + start
        tokens = self._ids(text)
        return tokens, self._new_tree(text, tokens, start, choices)

    def _new_tree(
        self, text: str, tokens: Sequence[int], start: str, choices: Sequence[str]
    ) -> ChoiceTree:
        text += "" if start else self._layout.gap
        return ChoiceTree(tokens, {choice: self._ids(text + choice) for choice in choices})

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
                "it holds half of a surrogate pair; send Unicode text", field="prompt"
            ) from None
        ids: list[int] = encoding.ids
        return ids

    def _control_tokens_of(self, shape: _Shape) -> list[int]:
        """The control tokens of a chat with these roles, whose contents have none."""
        messages = [{"role": role, "content": content} for role, content in shape]
        return self._control.filter(self._tokens(self._layout.render(messages)))


def _placeholder(content: str) -> str:
    return "x" if content.strip() else content[:1]


def _unescapable() -> InvalidRequest:
    return InvalidRequest(
        "it holds control tokens of the model that cannot be read as text; remove them",
        field="prompt",
    )


def _too_long(limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"it takes more tokens than the model's context of {limit}; shorten it",
        field="prompt",
        exceeds_context=True,
    )


def end_tokens(model: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end a turn, by the `model` part of a genai_config.json."""
    configured = model.get("eos_token_id")
    return frozenset(configured if isinstance(configured, list) else [configured]) - {None}


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

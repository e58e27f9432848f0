"""Log probabilities in the formats of the OpenAI API: of chats, and of completions (legacy)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.base import TokenLogprob
from llm_sidecar.services.conversation import Part, TextPart
from osiris.openai.text_offsets import TextOffsets

MAX_ENTRIES: Final = 1 << 17
"""Log probabilities of all choices of a request together; each takes some hundred bytes."""

_NAMES: Final = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
"""The lists of a completion's log probabilities, each with one entry for a token."""


async def bounded(
    parts: AsyncGenerator[tuple[int, Part], None],
) -> AsyncGenerator[tuple[int, Part], None]:
    """The parts of all choices of a request, as long as they have few enough log probabilities.

    Raises:
        InvalidRequest: there are more than `MAX_ENTRIES`, with those of the prompts.
    """
    entries = 0
    async with contextlib.aclosing(parts):
        async for number, part in parts:
            if isinstance(part, TextPart):
                tokens = (*part.prompt_logprobs, *part.logprobs)
                entries += sum(1 + len(token.top) for token in tokens)
            if entries > MAX_ENTRIES:
                raise InvalidRequest(
                    f"all choices together have more than {MAX_ENTRIES}; ask for fewer, or for "
                    "fewer choices or tokens",
                    field="logprobs",
                )
            yield number, part


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a choice of a chat."""
    return {
        "content": [
            {**_shown(token), "top_logprobs": [_shown(other) for other in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


class LegacyLogprobs:
    """`logprobs` of a choice of a completion; offsets are counted in characters of its text."""

    def __init__(self) -> None:
        """Begins before the first token."""
        self._offsets = TextOffsets()

    def of(self, echo: str, part: TextPart) -> dict[str, list[Any]]:
        """The log probabilities of the next tokens.

        Args:
            echo: the prompt, if it is in the text, with its log probabilities.
            part: the new text, its log probabilities and those of the prompt.
        """
        self._offsets.add(echo)
        tokens = [self._entry(token) for token in part.prompt_logprobs]
        if echo:
            self._offsets.skip()
        self._offsets.add(part.text)
        tokens += [self._entry(token) for token in part.logprobs]
        return {name: [token[name] for token in tokens] for name in _NAMES}

    def _entry(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            "tokens": token_text(token.data),
            "token_logprobs": token.logprob,
            "top_logprobs": self._top(token),
            "text_offset": self._offsets.of(token.data),
        }

    def _top(self, token: TokenLogprob) -> dict[str, float | None] | None:
        """The most likely tokens and the token itself; None for the first token of a prompt."""
        if token.logprob is None:
            return None
        top = {token_text(other.data): other.logprob for other in reversed(token.top)}
        return {**top, token_text(token.data): token.logprob}


def token_text(data: bytes) -> str:
    """A token as text; one that is part of a character as `bytes:` and its bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _shown(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.data.decode(errors="replace"),
        "logprob": token.logprob,
        "bytes": list(token.data),
    }

"""What an engine is asked for: completions, and the probabilities of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

Message = dict[str, str]
"""One chat turn: `{"role": "system" | "user" | "assistant", "content": text}`."""

ANSWER_TOKENS: Final = 4
"""Maximum number of tokens that `score_questions` processes after a prompt."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        messages: the chat, oldest first. If the last one is the assistant's, the completion
            continues it.
        max_tokens: maximum number of completion tokens; 0 for the log probabilities of the prompt
            alone.
        guidance: JSON schema text (llguidance dialect) that the completion must follow, or None.
        temperature: 0 is greedy; otherwise it divides the logits before sampling. None for the
            model's own sampling, from its folder.
        seed: makes sampling repeatable.
        tokens: of the messages or the text, as `Engine.tokenize` returns them, or a prompt of its
            own; None to tokenize them later.
        text: a prompt without a chat template, instead of messages; None for a chat. Like messages,
            it cannot contain control tokens.
        top_p: nucleus sampling with this probability instead of the model's own; None for that.
        logprobs: the number of most likely tokens with log probabilities for each completion
            token; 0 for the token alone, None for no log probabilities. With log probabilities,
            guidance forces no tokens: the model computes each one.
        prompt_logprobs: the same for each token of the prompt.
        echo: whether the prompt is returned as text, in which control tokens are spelled.
        fit_context: whether `max_tokens` is lowered to what the context leaves after the prompt;
            without it, a request that does not fit is refused.
        check_answer: whether a model on another server, which may not follow the guidance, refuses
            unsupported keywords and checks the finished answer. All other models follow it.
    """

    messages: Sequence[Message]
    max_tokens: int
    guidance: str | None = None
    temperature: float | None = 0.0
    seed: int | None = None
    tokens: Sequence[int] | None = None
    text: str | None = None
    top_p: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    fit_context: bool = False
    check_answer: bool = False

    def most_tokens(self, prompt_tokens: int, context_length: int) -> int:
        """`max_tokens`, or with `fit_context` what the context leaves of it."""
        if not self.fit_context:
            return self.max_tokens
        # At least one, so that a prompt that fills the context is still refused.
        return max(1, min(self.max_tokens, context_length - prompt_tokens))


class Question(NamedTuple):
    """A chat, and the answers whose probabilities are needed.

    Attributes:
        tokens: of the chat, as `Engine.tokenize` returns them for `request`; None to tokenize it
            later.
    """

    messages: Sequence[Message]
    choices: Sequence[str]
    tokens: Sequence[int] | None = None

    @property
    def request(self) -> GenerationRequest:
        """The chat, with capacity for an answer."""
        return GenerationRequest(self.messages, ANSWER_TOKENS, tokens=self.tokens)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen; the defaults are greedy.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token, and of the fields below
            only the repetition penalty applies.
        top_k: only this many of the most probable tokens; 0 for all.
        top_p: only the most probable tokens that together reach this probability (nucleus
            sampling: Holtzman et al. 2020, arXiv:1904.09751).
        min_p: only tokens with at least this share of the highest probability (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: divides the positive logits of tokens that the prompt or the completion
            has, and multiplies the negative ones (Keskar et al. 2019, "CTRL", arXiv:1909.05858,
            section 4.1); 1 for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

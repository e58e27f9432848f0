"""The probabilities of some answers, by the best method that a server supports.

1. `/v1/decisions`: one forward pass, for any tokenizer.
2. The log probabilities of the most likely first tokens of an answer.
3. The answer as text. It says nothing about the other answers, so its mass is about 0, and its
   score is unreliable. This is also used if the log probabilities are impossible, or do not tell
   likely answers apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from llm_sidecar.engines.base import Message, TokenLogprob

SAID_MASS: Final = 1e-9
"""The probability of an answer that is known as text only."""
ANSWER_TOKENS: Final = 12
"""Length of an answer; a model may repeat the start of its turn, such as `{"score":`."""

_MOST_TOTAL: Final = 1.01
"""Maximum total probability of the tokens at a position; rounding takes it a little above 1."""
LEAST_DIVIDED: Final = 0.01
"""Minimum probability of a token that begins several choices to justify a second request."""
MOST_UNDECIDED: Final = 0.05
"""From this probability of such a token, a score that leaves out its choices would mislead."""
_SAME: Final = 0.01
"""Maximum difference of a token's probability between two requests: it depends on the batch."""


def question_text(messages: Sequence[Message]) -> str:
    """A chat as one text, without the beginning of the assistant's turn."""
    return "\n\n".join(message["content"] for message in messages if message["role"] != "assistant")


def start_of_answer(messages: Sequence[Message]) -> str:
    """The beginning of the assistant's turn in the chat; empty if there is none."""
    last = messages[-1]
    return last["content"] if last["role"] == "assistant" else ""


def from_text(text: str, start: str, choices: Sequence[str]) -> dict[str, float]:
    """The scores of a text, whose answer is the longest choice that it begins with."""
    answer = text.strip().removeprefix(start).strip()
    found = max((choice for choice in choices if answer.startswith(choice)), key=len, default=None)
    return {choice: SAID_MASS if choice == found else 0.0 for choice in choices}


def are_possible(tokens: Sequence[TokenLogprob], start: str) -> bool:
    """Whether the log probabilities where the answer begins can be those of alternatives: a server
    may fill in a constant."""
    at = _begin(tokens, start)
    return at is not None and sum(map(_probability, _candidates(tokens[at]))) <= _MOST_TOTAL


def from_logprobs(
    answers: Sequence[Sequence[TokenLogprob]], start: str, choices: Sequence[str]
) -> dict[str, float]:
    """The scores of the tokens of an answer.

    The answer begins at the first token, or after the start if the model repeats it: not all
    servers continue the assistant's turn. If a token begins several choices, as `1` begins 1 and
    10, the next token tells them apart. If no answer has that, it counts for none of them, and
    the mass is smaller.

    Args:
        answers: the tokens of the answer, and of a second one that is forced to begin with
            `undecided`.
        start: see `start_of_answer`.
    """
    scores = dict.fromkeys(choices, 0.0)
    at = _begin(answers[0], start)
    if at is None:
        return scores
    for token in _candidates(answers[0][at]):
        text = _text(token).strip()
        following = _following(text, answers, start)
        for choice, share in _shares(text, answers[0][at], following, choices).items():
            scores[choice] += _probability(token) * share
    return scores


def undecided(
    answers: Sequence[Sequence[TokenLogprob]], start: str, choices: Sequence[str], least: float
) -> str | None:
    """The beginning of an answer whose unknown next token decides between choices; None if there is
    no such answer.

    Args:
        answers: see `from_logprobs`.
        least: minimum probability of the token that begins several choices.
    """
    tokens = answers[0]
    at = _begin(tokens, start)
    if at is None:
        return None
    for token in _candidates(tokens[at]):
        text = _text(token).strip()
        if not text or sum(choice.startswith(text) for choice in choices) < 2:
            continue
        known = _shares(text, tokens[at], _following(text, answers, start), choices)
        if not known and _probability(token) >= least:
            return "".join(map(_text, tokens[:at])) + _text(token)
    return None


def is_unguided(forced: Sequence[TokenLogprob], free: Sequence[TokenLogprob]) -> bool:
    """Whether the first token of a forced answer has the probability that it has without force.

    Otherwise the server computes probabilities among the tokens that guidance allows.
    """
    if not forced or not free:
        return False
    known = {one.data: _probability(one) for one in _candidates(free[0])}
    return abs(known.get(forced[0].data, 0.0) - _probability(forced[0])) <= _SAME


def _begin(tokens: Sequence[TokenLogprob], start: str) -> int | None:
    """The position of the answer: after the start, else the first one."""
    compact, text = "".join(start.split()), ""
    for position, token in enumerate(tokens):
        text += "".join(_text(token).split())
        if compact and text == compact and position + 1 < len(tokens):
            return position + 1
        if not compact.startswith(text):
            break
    return 0 if tokens else None


def _candidates(token: TokenLogprob) -> list[TokenLogprob]:
    """The most likely tokens at a position; the sampled one need not be among them."""
    known = {one.data: one for one in (*token.top, token)}
    return list(known.values())


def _following(
    text: str, answers: Sequence[Sequence[TokenLogprob]], start: str
) -> list[TokenLogprob]:
    """The most likely tokens after a first token, if an answer begins with it."""
    for tokens in answers:
        at = _begin(tokens, start)
        if at is not None and at + 1 < len(tokens) and _text(tokens[at]).strip() == text:
            return _candidates(tokens[at + 1])
    return []


def _shares(
    text: str, first: TokenLogprob, following: Sequence[TokenLogprob], choices: Sequence[str]
) -> dict[str, float]:
    """How the probability of a first token is divided among the choices; empty if unknown."""
    begun = max((choice for choice in choices if text.startswith(choice)), key=len, default=None)
    longer = [choice for choice in choices if choice.startswith(text) and choice != text]
    if not text or (begun is None and not longer):
        return {}
    if not longer or _has_token(longer, first):
        return {} if begun is None else {begun: 1.0}
    if begun is None and len(longer) == 1:
        return {longer[0]: 1.0}
    shares: dict[str, float] = {}
    for token in following:
        whole = text + _text(token)
        found = max((one for one in longer if whole.startswith(one)), key=len, default=begun)
        if found is not None:
            shares[found] = shares.get(found, 0.0) + _probability(token)
    return shares


def _probability(token: TokenLogprob) -> float:
    return math.exp(token.logprob or 0.0)


def _has_token(choices: Sequence[str], token: TokenLogprob) -> bool:
    """Whether a choice is a token of its own, so that no shorter token begins it."""
    texts = {_text(one).strip() for one in _candidates(token)}
    return not texts.isdisjoint(choices)


def _text(token: TokenLogprob) -> str:
    return token.data.decode(errors="replace")

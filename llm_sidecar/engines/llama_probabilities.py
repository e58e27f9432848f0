"""Log probabilities from llama.cpp's server, before any sampling.

The server returns the most likely tokens after a prompt, and the token that it chooses. So a token
that is forced by a bias comes with its own probability, however unlikely it is: the probabilities
are those before the bias.

A token that ends inside a character, such as a part of an emoji, comes without probabilities. Where
they are needed, they are read from the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import TokenLogprob
from llm_sidecar.engines.gguf_model import Token
from llm_sidecar.engines.llama_connection import Connection
from llm_sidecar.engines.outputs import LEAST_LOGPROB

_FORCED: Final = 1e6
"""A bias larger than all logits, which forces a token."""
_MOST_LIKELY: Final = 512
"""Number of tokens in a first request; an answer with all tokens takes megabytes."""


class _Likely(msgspec.Struct):
    """A token as the server describes it."""

    id: int
    logprob: float
    bytes: list[int] = []


class Position(_Likely):
    """A token of a completion, and the most likely ones at its position."""

    top_logprobs: list[_Likely] = []


class Timings(msgspec.Struct, frozen=True):
    """A part of an answer.

    Attributes:
        cache_n: prompt tokens whose states were cached.
    """

    cache_n: int = 0


class Answer(msgspec.Struct):
    """The answer to a completion request that is not streamed.

    Attributes:
        tokens: of the completion, if requested.
        completion_probabilities: of its tokens, without those that end inside a character.
        stop_type: `eos`, or `limit`.
    """

    stop_type: str
    tokens: list[int] = []
    completion_probabilities: list[Position] = []
    timings: Timings = Timings()


ANSWER: Final = msgspec.json.Decoder(Answer)


class _Number(msgspec.Struct):
    """A token without its bytes, which take most of the time if there are many."""

    id: int
    logprob: float


class _Numbers(msgspec.Struct):
    top_logprobs: list[_Number]


class _Distribution(msgspec.Struct):
    completion_probabilities: list[_Numbers]


_DISTRIBUTION: Final = msgspec.json.Decoder(_Distribution)


class Probabilities:
    """The probabilities of one model."""

    def __init__(self, vocabulary: int, added: Mapping[int, Token], plain: int) -> None:
        """Args:
        vocabulary: number of tokens.
        added: the control tokens and the added ones.
        plain: a token of whole characters.
        """
        self._vocabulary = vocabulary
        self._added = added
        self._plain = plain

    def after(
        self, connection: Connection, tokens: Sequence[int], needed: Collection[int]
    ) -> Generator[None, None, npt.NDArray[np.float32]]:
        """The logarithm of the probability of the needed next tokens, and of the most likely ones.

        It works step by step, as `Engine.prefill` does, and returns the result; see `distribution`.
        """
        body = _body(tokens, self._plain, _MOST_LIKELY) | {"stream": True, "return_progress": True}
        likely: list[tuple[int, float]] = []
        for event in connection.events("/completion", body):
            for position in event.get("completion_probabilities", ()):
                likely = [(one["id"], one["logprob"]) for one in position["top_logprobs"]]
            yield
        if {number for number, _ in likely}.issuperset(needed):
            return self._array(likely)
        return self.distribution(connection, tokens)

    def distribution(
        self, connection: Connection, tokens: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """The logarithm of the probability of each next token.

        Returns:
            (vocabulary + 1,); the last one is that of all tokens that are unknown.
        """
        answer = connection.post("/completion", _body(tokens, self._plain, self._vocabulary))
        (position,) = _DISTRIBUTION.decode(answer).completion_probabilities
        return self._array((one.id, one.logprob) for one in position.top_logprobs)

    def _array(self, likely: Iterable[tuple[int, float]]) -> npt.NDArray[np.float32]:
        found = np.full(self._vocabulary + 1, -np.inf)
        for number, logprob in likely:
            found[number] = logprob
        rest = 1.0 - np.exp(found).sum()
        if rest > 0.0:
            found[-1] = np.log(rest)
        return found.astype(np.float32)

    def of(
        self, connection: Connection, before: Sequence[int], token: int, top: int
    ) -> TokenLogprob:
        """The log probability of a token after others, with the `top` most likely ones."""
        answer = connection.post("/completion", _body(before, token, max(top, 1)))
        if positions := ANSWER.decode(answer).completion_probabilities:
            return self.read(positions[0], top)
        answer = connection.post("/completion", _body(before, self._plain, self._vocabulary))
        (position,) = ANSWER.decode(answer).completion_probabilities
        (likely,) = (one for one in position.top_logprobs if one.id == token)
        return self._logprob(likely, self.read(position, top).top)

    def read(self, position: Position, top: int) -> TokenLogprob:
        """The token of a position with the `top` most likely ones."""
        likely = position.top_logprobs[:top]
        return self._logprob(position, tuple(self._logprob(one) for one in likely))

    def text(self, tokens: Sequence[TokenLogprob]) -> bytes:
        """What tokens add to a text, in UTF-8: control tokens add nothing."""
        return b"".join(one.data for one in tokens if not self._is_control(one.id))

    def _is_control(self, token: int) -> bool:
        return token in self._added and self._added[token].special

    def _logprob(self, one: _Likely, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        # llama.cpp leaves the text of control tokens out.
        added = self._added.get(one.id)
        data = bytes(one.bytes) if added is None else added.content.encode()
        return TokenLogprob(one.id, data, max(one.logprob, LEAST_LOGPROB), top)


def _body(before: Sequence[int], token: int, count: int) -> dict[str, Any]:
    """A request whose completion is one token."""
    return {
        "prompt": before,
        "n_predict": 1,
        "n_probs": count,
        "post_sampling_probs": False,
        "logit_bias": [[token, _FORCED]],
        "temperature": 0.0,
        "cache_prompt": True,
    }

"""Log probabilities of tokens, from the logits of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import TokenLogprob
from llm_sidecar.engines.outputs import LEAST_LOGPROB
from llm_sidecar.errors import InvalidRequest

_MAX_PROMPT_ENTRIES: Final = 1 << 17
"""Maximum number for one prompt; each takes about 200 bytes on its way to the client."""


def token_logprob(
    token: int, logits: npt.NDArray[Any], top: int, data: Callable[[int], bytes]
) -> TokenLogprob:
    """The log probability of a token, and the most likely tokens at its position.

    Args:
        token: its id.
        logits: (vocabulary,) of its position, as the model computes them.
        top: the number of most likely tokens.
        data: returns the bytes of a token.
    """
    logprobs = log_softmax(logits)

    def entry(index: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(index, data(index), max(LEAST_LOGPROB, float(logprobs[index])), top)

    return entry(token, tuple(entry(index) for index in most_likely(logits, top)))


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The natural logarithm of the softmax of logits, (vocabulary,), in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def most_likely(logits: npt.NDArray[Any], count: int) -> list[int]:
    """The ids of the `count` largest logits, largest first. Of equal logits, the lower id comes
    first, as in greedy sampling."""
    count = min(count, len(logits))
    if count == 0:
        return []
    least = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    found: list[int] = candidates[order].tolist()
    return found


def check_prompt_logprobs(prompt_tokens: int, top: int) -> None:
    """Raises InvalidRequest if the log probabilities of a prompt would take too much memory."""
    if prompt_tokens * (1 + top) > _MAX_PROMPT_ENTRIES:
        raise InvalidRequest(
            f"{top} for each of {prompt_tokens} prompt tokens are too many; "
            "ask for fewer or shorten the prompt",
            field="logprobs",
        )

"""Failover: which requests another replica repeats, and which of its text the caller still needs.

failover = Failover(request)
...  # a replica generates: `failover.new_text(text, adapter)` before a text is given out
failover.lost(error)  # it has died: raises the error if the request cannot be repeated
...  # a replica with `failover.takes(adapter)` generates the same text once more
"""

from __future__ import annotations

from typing import Final

from llm_sidecar.errors import ModelUnavailable, SidecarError
from llm_sidecar.models.base import GenerationRequest


class ReplicaLost(ModelUnavailable):
    """A replica has not answered a request, and another one may."""


_REPEATS: Final = 1
"""How often a request is repeated: one that kills its replica must not kill all of them."""


class Failover:
    """One request that several replicas may serve, one after the other.

    The caller gets each part of the text once, and all of it from replicas with the same adapter.
    """

    def __init__(self, request: GenerationRequest | None = None) -> None:
        """Nothing is given out yet.

        Args:
            request: the generation; None for scores, which are given out as a whole.
        """
        self._repeatable = request is None or _is_repeatable(request)
        self._repeats = 0
        self._has_given = False
        self._adapter: str | None = None
        self._given = ""
        self._position = 0

    @property
    def repeats_text(self) -> bool:
        """Whether the next text was given out before the replica was lost."""
        return self._position < len(self._given)

    def takes(self, adapter: str | None) -> bool:
        """Whether a replica with this adapter may continue."""
        return not self._has_given or adapter == self._adapter

    def lost(self, error: SidecarError) -> None:
        """Prepares to repeat the request on another replica.

        Args:
            error: why the replica is lost.

        Raises:
            SidecarError: this error, if the request cannot be repeated.
        """
        if self._repeats == _REPEATS or (self._has_given and not self._repeatable):
            raise error
        self._repeats += 1
        self._position = 0

    def new_text(self, text: str, adapter: str | None, *, is_last: bool = False) -> str:
        """The part of the next generated text that has not been given out yet.

        Call it before anything is given out, also with an empty text.

        Args:
            text: follows the text of the last call, or begins the generation after `lost`.
            adapter: the name of the adapter that generates it.
            is_last: whether the generation ends with it.

        Raises:
            ModelUnavailable: the repeated generation differs from what was given out.
        """
        expected = self._given[self._position : self._position + len(text)]
        self._position += len(text)
        if not text.startswith(expected) or (is_last and self.repeats_text):
            raise ModelUnavailable(
                "A replica ended while it answered, and another one would continue differently; "
                "try again.",
                retry_after=1,
            )
        new = text[len(expected) :]
        self._has_given, self._adapter = True, adapter
        self._given += new
        return new


def _is_repeatable(request: GenerationRequest) -> bool:
    """Whether a second generation gives the same text, and the caller gets nothing but text."""
    is_same = request.temperature == 0.0 or request.seed is not None
    only_text = request.logprobs is None and request.prompt_logprobs is None and not request.echo
    return is_same and only_text

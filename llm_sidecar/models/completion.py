"""What a model generates: deltas, and the completion that they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_sidecar.engines.base import FinishReason, TokenLogprob
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.telemetry.calls import ModelCall


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a generation, and the counts so far.

    Attributes:
        text: generated since the previous delta.
        model: the label of the model that generates, as in `X-Model`.
        adapter: the name of its adapter, or None.
        prompt_tokens, completion_tokens: so far.
        cached_tokens: prompt tokens whose prefill was reused from an earlier prompt.
        finish_reason: set in the last delta only; `deadline` if the deadline truncated the text.
        identity: the files and runtime of the model; None if unknown.
        logprobs: see `engines.base.Delta`.
        prompt_logprobs: of all prompt tokens, in the first delta.
        prompt_text: the prompt as text, in the first delta, if requested.
    """

    text: str
    model: str
    adapter: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | Literal["deadline"] | None = None
    identity: ModelIdentity | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_text: str = ""

    @classmethod
    def of(
        cls,
        call: ModelCall,
        text: str,
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
        prompt_text: str = "",
    ) -> Delta:
        """New text of a call that is served, with the counts so far."""
        assert call.served_by is not None
        return cls(
            text,
            call.served_by,
            call.adapter,
            call.prompt_tokens,
            call.completion_tokens,
            call.cached_tokens,
            call.finish_reason,
            call.identity,
            logprobs,
            prompt_logprobs,
            prompt_text,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation; the fields are those of its last delta, with the whole text."""

    text: str
    model: str
    adapter: str | None
    finish_reason: FinishReason | Literal["deadline"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    identity: ModelIdentity | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """Joins all deltas of a generation.

        Raises:
            ModelUnavailable: the model ended the stream before the generation had finished.
        """
        if not deltas or deltas[-1].finish_reason is None:
            raise ModelUnavailable(
                "The model ended its answer before it was complete; try again.", retry_after=1
            )
        last = deltas[-1]
        return cls(
            "".join(delta.text for delta in deltas),
            last.model,
            last.adapter,
            deltas[-1].finish_reason,
            last.prompt_tokens,
            last.completion_tokens,
            last.cached_tokens,
            last.identity,
            tuple(token for delta in deltas for token in delta.logprobs),
            tuple(token for delta in deltas for token in delta.prompt_logprobs),
        )

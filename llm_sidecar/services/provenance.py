"""The provenance of a proposal, in its row: enough to generate it again and to find what differs.

A prompt version is a SHA-256 over all texts that our code adds, so it changes whenever one of them
changes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from llm_sidecar import __version__, hermes_plugin, proposals
from llm_sidecar.models.base import Completion, GenerationRequest, Message
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.proposals import Example, Proposed


class _Record(BaseModel):
    # A later version may record more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Guidance(_Record):
    """The guidance of a generation.

    Attributes:
        kind: `proposal`, or `grounded` for the one that is limited to the context.
        ticker: the first ticker that `grounded` offers. `proposals.grounded_guidance` makes the
            guidance again from it, the prompt and the maximum number of tokens.
        version: SHA-256 of the JSON schema.
    """

    kind: Literal["proposal", "grounded"]
    ticker: str | None = None
    version: str

    @classmethod
    def of(cls, text: str) -> Self:
        """The record of a guidance of proposals."""
        if not proposals.is_grounded_guidance(text):
            return cls(kind="proposal", version=_digest(text))
        first = json.loads(text)["properties"]["ticker"]["enum"][0]
        return cls(kind="grounded", ticker=first, version=_digest(text))

    def text(self, prompt: str, max_tokens: int) -> str | None:
        """The guidance that the current code makes for this prompt and maximum number of tokens;
        None if the prompt has no ticker."""
        if self.ticker is None:
            return proposals.guidance(max_tokens)
        return proposals.grounded_guidance(prompt, [self.ticker], max_tokens)


class Generated(_Record):
    """How a text was generated.

    Attributes:
        label: of the model, as in `X-Model`.
        adapter: the name of its adapter.
        identity: the files and runtime of the model; None if unknown.
        prompt_version: of the texts that our code puts around the input.
        chat: SHA-256 of the whole chat.
        guidance: None without one.
        temperature: None for the model's own sampling, which its `identity` covers.
        seed: None at temperature 0, which needs none.
    """

    label: str
    adapter: str | None
    identity: ModelIdentity | None
    prompt_version: str
    chat: str
    guidance: Guidance | None
    temperature: float | None
    seed: int | None
    max_tokens: int

    @classmethod
    def of(cls, request: GenerationRequest, completion: Completion, prompt_version: str) -> Self:
        """The record of a request and its completion."""
        return cls(
            label=completion.model,
            adapter=completion.adapter,
            identity=completion.identity,
            prompt_version=prompt_version,
            chat=_digest(list(request.messages)),
            guidance=None if request.guidance is None else Guidance.of(request.guidance),
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.max_tokens,
        )


class Provenance(_Record):
    """The provenance of a proposal and its critique.

    Attributes:
        sidecar: the version of this package.
        api_key: the name of the key that the request came with.
        examples: the feedback_ids of the few-shot examples in the chat, oldest first.
        proposal: how Phi-3 generated it.
        critique: how Hermes generated it; None if there is none. The score has the same model and
            prompt version, and neither sampling nor guidance.
    """

    sidecar: str
    api_key: str | None
    examples: tuple[str, ...]
    proposal: Generated
    critique: Generated | None = None

    @classmethod
    def of(cls, made: Proposed, api_key: str | None) -> Self:
        """The record of a proposal that is not criticised yet."""
        assert made.request is not None
        return cls(
            sidecar=__version__,
            api_key=api_key,
            examples=made.examples,
            proposal=Generated.of(made.request, made.completion, proposal_prompt_version()),
        )

    def with_critique(
        self, request: GenerationRequest, completion: Completion, prompts: Prompts
    ) -> Self:
        """A copy with the record of the critique."""
        critique = Generated.of(request, completion, critique_prompt_version(prompts))
        return self.model_copy(update={"critique": critique})


@functools.cache
def proposal_prompt_version() -> str:
    """SHA-256 of the chat for Phi-3, with placeholders for the prompt and one example."""
    example: dict[str, Any] = dict.fromkeys(proposals.Proposal.model_fields)
    return _digest(proposals.build_messages("prompt", [Example("example", example)]))


@functools.cache
def critique_prompt_version(prompts: Prompts) -> str:
    """SHA-256 of the chats for Hermes, with placeholders for the proposal and the context."""
    proposal, context = {"ticker": "proposal"}, "context"
    chats: Sequence[list[Message]] = [
        hermes_plugin.build_messages(prompts.critique_task, proposal, context, prompts.system),
        hermes_plugin.score_messages(proposal, context, prompts),
    ]
    return _digest([chats, hermes_plugin.SCORE_ANSWERS])


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

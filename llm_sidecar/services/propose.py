"""A proposal: Phi-3 writes it under guidance, and it is checked before it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace

from llm_sidecar import grounding, proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, SidecarError
from llm_sidecar.models.base import ChatModel, Completion, Delta, GenerationRequest
from llm_sidecar.proposals import Example, Proposed
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)


class Proposer:
    """Phi-3, asked for proposals."""

    def __init__(
        self,
        phi3: ChatModel,
        examples: Callable[[], Sequence[Example]],
        metrics: MetricsSink,
        *,
        temperature: float,
        timeout: float,
        retry: bool,
    ) -> None:
        """Asks nothing.

        Args:
            phi3: the model.
            examples: returns the few-shot examples in use, oldest first.
            metrics: observes every proposal.
            temperature: 0 is greedy.
            timeout: seconds that a proposal without a deadline may take.
            retry: whether an ungrounded proposal is generated once more, under the guidance of its
                context, in at most half of the time that is left.
        """
        self._phi3 = phi3
        self._examples = examples
        self._metrics = metrics
        self._temperature = temperature
        self._timeout = timeout
        self._retry = retry

    async def generate(
        self, prompt: str, max_tokens: int, deadline: Deadline | None = None
    ) -> AsyncGenerator[Delta | Proposed, None]:
        """Generates a proposal; it is neither assessed nor stored nor published.

        Args:
            prompt: the market context.
            max_tokens: at least `proposals.MAX_COMPLETION_TOKENS`.
            deadline: of the request that this belongs to, the retry included.

        Yields:
            Deltas as they are generated, those of a retry too; last the valid proposal, the first
            one if the retry fails.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        proposals.check_budget(max_tokens)
        deadline = deadline or Deadline.after(self._timeout)
        examples = self._examples()
        request = self._request(prompt, max_tokens, examples)
        deltas: list[Delta] = []
        try:
            async with self._ask(request, deadline, deltas) as stream:
                async for delta in stream:
                    yield delta
        except InvalidRequest:
            if not examples:
                raise
            log.warning("the few-shot examples do not fit the context beside a long prompt")
            request = self._request(prompt, max_tokens)
            async with self._ask(request, deadline, deltas) as stream:
                async for delta in stream:
                    yield delta
        proposed = await _proposed(Completion.of(deltas), prompt)
        if again := await self._retry_request(prompt, request, proposed):
            # The other half of the time is for the assessment: a slow retry must not cause a 504.
            half = Deadline.after(deadline.remaining() / 2)
            try:
                async with self._ask(again, half, deltas) as stream:
                    async for delta in stream:
                        yield delta
                proposed = await _proposed(Completion.of(deltas), prompt)
            except SidecarError as error:
                log.warning("the retry of an ungrounded proposal failed: %s", type(error).__name__)
        self._metrics.proposed(proposed.proposal["action"], proposed.ungrounded)
        yield proposed

    @contextlib.asynccontextmanager
    async def _ask(
        self, request: GenerationRequest, deadline: Deadline, deltas: list[Delta]
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """The deltas of one generation, which are also collected in `deltas`."""

        async def collect() -> AsyncIterator[Delta]:
            async for delta in stream:
                deltas.append(delta)
                yield delta

        deltas.clear()
        async with contextlib.aclosing(self._phi3.stream(request, deadline)) as stream:
            yield collect()

    async def _retry_request(
        self, prompt: str, request: GenerationRequest, first: Proposed
    ) -> GenerationRequest | None:
        """The request under the guidance of the context; None where no retry is due."""
        if not self._retry or not first.ungrounded:
            return None
        # A grounded ticker is always offered, even if the context has too many others.
        tickers = [] if "ticker" in first.ungrounded else [first.proposal["ticker"]]
        guidance = await asyncio.to_thread(proposals.grounded_guidance, prompt, tickers)
        # With a seed, a runtime that keeps a cache for each guidance does not keep one for this.
        return None if guidance is None else replace(request, guidance=guidance, seed=0)

    def _request(
        self, prompt: str, max_tokens: int, examples: Sequence[Example] = ()
    ) -> GenerationRequest:
        messages = proposals.build_messages(prompt, examples)
        return GenerationRequest(messages, max_tokens, proposals.GUIDANCE, self._temperature)


async def _proposed(completion: Completion, prompt: str) -> Proposed:
    """The valid proposal in a completion.

    Raises:
        ModelUnavailable: there is none.
    """
    try:
        proposal = proposals.parse(completion.text)
    except ValueError as error:
        log.error("phi3 broke the proposal schema under guidance: %s", type(error).__name__)
        raise ModelUnavailable(
            "phi3 wrote something that is no valid proposal, so nothing is returned; "
            "check the model with another prompt.",
            retry_after=1,
        ) from None
    # In a thread, because a long context would block the event loop.
    ungrounded = await asyncio.to_thread(grounding.ungrounded_fields, proposal, prompt)
    return Proposed(proposal, completion, ungrounded)

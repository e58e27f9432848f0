"""Proposals: Phi-3 generates them under guidance, Hermes judges them, and they are stored."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Final

from llm_sidecar import grounding, proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, QueueFull, SidecarError
from llm_sidecar.models.base import (
    ChatModel,
    Completion,
    Delta,
    GenerationRequest,
    Message,
    RefusedRequest,
    new_seed,
)
from llm_sidecar.proposals import Example, Proposed
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.proposal_run import UNFINISHED, AssessedProposal, ProposalRun
from llm_sidecar.services.rows import Rows
from llm_sidecar.services.score import Judge
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)

Items = AsyncGenerator[Delta | Proposed, None]
"""The deltas of one or more generations, and finally a proposal."""

_LEAST_TEMPERATURE: Final = 0.7
"""Minimum temperature of the second request, if the first proposal was not valid."""


class InvalidProposal(ModelUnavailable):
    """The model did not generate a valid proposal."""


class Proposer:
    """Generates proposals with Phi-3."""

    def __init__(
        self,
        phi3: ChatModel,
        examples: Callable[[], Sequence[Example]],
        metrics: MetricsSink,
        *,
        temperature: float,
        retry: bool,
    ) -> None:
        """Calls no model yet.

        Args:
            phi3: the model.
            examples: returns the few-shot examples in use, oldest first.
            metrics: receives every proposal.
            temperature: 0 is greedy.
            retry: whether an ungrounded proposal is generated once more, under the guidance of its
                context, in at most half of the time that is left.
        """
        self._phi3 = phi3
        self._examples = examples
        self._metrics = metrics
        self._temperature = temperature
        self._retry = retry

    @property
    def may_repeat(self) -> bool:
        """Whether a proposal may be generated twice, so that not all deltas belong to it."""
        return self._retry or not self._phi3.valid_by_construction

    async def generate(self, prompt: str, max_tokens: int, deadline: Deadline) -> Items:
        """Generates a proposal from a market context; see `answer`."""
        answer = self.answer([{"role": "user", "content": prompt}], max_tokens, deadline)
        try:
            async with contextlib.aclosing(answer) as items:
                async for item in items:
                    yield item
        except RefusedRequest as error:
            # The client has only written the context: it cannot correct the request.
            raise ModelUnavailable(error.detail, retry_after=5) from None

    async def answer(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        deadline: Deadline,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
    ) -> Items:
        """Generates a proposal; it is neither assessed nor stored nor published.

        Args:
            messages: the chat that asks for it; the user's turns are the market context. If it has
                no system turn, the system prompt and the few-shot examples come first.
            max_tokens: at least `proposals.MIN_COMPLETION_TOKENS`.
            deadline: of the whole request, all generations included.
            temperature: default: that of all proposals.
            top_p, seed, logprobs: see `GenerationRequest`; the default of the seed is a new one.

        Yields:
            Deltas as they are generated, including those of further generations; finally the valid
            proposal, which is the first one if the retry fails.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        proposals.check_budget(max_tokens)
        temperature = self._temperature if temperature is None else temperature
        request = GenerationRequest(
            messages,
            max_tokens,
            proposals.guidance(max_tokens),
            temperature,
            new_seed(temperature) if seed is None else seed,
            top_p=top_p,
            logprobs=logprobs,
        )
        has_system = any(message["role"] == "system" for message in messages)
        examples = () if has_system else self._examples()
        context = "\n".join(message["content"] for message in messages if message["role"] == "user")
        started = False
        while True:
            opening = [] if has_system else proposals.opening(examples)
            opened = replace(request, messages=[*opening, *messages])
            try:
                async with contextlib.aclosing(self._grounded(opened, context, deadline)) as items:
                    async for item in items:
                        started = True
                        if isinstance(item, Proposed):
                            ids = (example.feedback_id for example in examples)
                            item = item._replace(examples=tuple(filter(None, ids)))
                        yield item
                return
            except InvalidRequest as error:
                # Before the first delta, the chat is too long for the model.
                if started or not examples or isinstance(error, RefusedRequest):
                    raise
                log.warning("the few-shot examples do not fit the context beside a long prompt")
                examples = ()

    async def _grounded(
        self, request: GenerationRequest, context: str, deadline: Deadline
    ) -> Items:
        """A valid proposal; if it is ungrounded, once more under the guidance of its context."""
        proposed: Proposed | None = None
        async with contextlib.aclosing(self._valid(request, context, deadline)) as items:
            async for item in items:
                if isinstance(item, Proposed):
                    proposed = item
                else:
                    yield item
        assert proposed is not None
        if again := await self._retry_request(proposed, context):
            # The other half of the time is for the assessment: a slow retry must not cause a 504.
            half = Deadline.after(deadline.remaining() / 2)
            try:
                async with contextlib.aclosing(self._once(again, context, half)) as items:
                    async for item in items:
                        if isinstance(item, Proposed):
                            proposed = item
                        else:
                            yield item
            except SidecarError as error:
                log.warning("the retry of an ungrounded proposal failed: %s", type(error).__name__)
        self._metrics.proposed(proposed.proposal["action"], proposed.ungrounded)
        yield proposed

    async def _valid(self, request: GenerationRequest, context: str, deadline: Deadline) -> Items:
        """A proposal; if a model that may ignore the guidance did so, from a second request."""
        try:
            async with contextlib.aclosing(self._once(request, context, deadline)) as items:
                async for item in items:
                    yield item
            return
        except InvalidProposal:
            if self._phi3.valid_by_construction:
                raise
        second = _second_request(request)
        async with contextlib.aclosing(self._once(second, context, deadline)) as items:
            async for item in items:
                yield item

    async def _once(self, request: GenerationRequest, context: str, deadline: Deadline) -> Items:
        """One generation: its deltas, and its proposal.

        Raises:
            InvalidProposal: it is not valid.
        """
        deltas: list[Delta] = []
        async with contextlib.aclosing(self._phi3.stream(request, deadline)) as stream:
            async for delta in stream:
                deltas.append(delta)
                yield delta
        yield await self._proposed(request, Completion.of(deltas), context)

    async def _proposed(
        self, request: GenerationRequest, completion: Completion, context: str
    ) -> Proposed:
        """The valid proposal of a finished generation.

        Raises:
            InvalidRequest: the model's tokenizer needs a larger `max_tokens`.
            InvalidProposal: there is none.
        """
        most, follows = proposals.MAX_COMPLETION_TOKENS, self._phi3.valid_by_construction
        # A model that ignores the guidance may use up any budget.
        if follows and completion.finish_reason == "length" and request.max_tokens < most:
            raise InvalidRequest(
                f"this model's tokenizer needs more than {request.max_tokens} tokens for a "
                f"proposal; send {most}",
                field="max_length",
            )
        try:
            if follows:
                proposal = proposals.parse(completion.text)
            else:
                guidance = request.guidance or proposals.GUIDANCE
                proposal = await asyncio.to_thread(
                    proposals.parse_guided, completion.text, guidance
                )
        except ValueError as error:
            log.error("phi3 broke the proposal schema under guidance: %s", type(error).__name__)
            raise InvalidProposal(
                "phi3 did not write a valid proposal, so nothing is returned; "
                "check the model with another prompt.",
                retry_after=1,
            ) from None
        # In a thread, because a long context would block the event loop.
        ungrounded = await asyncio.to_thread(grounding.ungrounded_fields, proposal, context)
        return Proposed(proposal, completion, ungrounded, request)

    async def _retry_request(self, first: Proposed, context: str) -> GenerationRequest | None:
        """The request with guidance limited to the context; None if no retry is needed."""
        request = first.request
        if request is None or not self._retry or not first.ungrounded:
            return None
        # A grounded ticker is always offered, even if the context has too many others.
        tickers = [] if "ticker" in first.ungrounded else [first.proposal["ticker"]]
        guidance = await asyncio.to_thread(
            proposals.grounded_guidance, context, tickers, request.max_tokens
        )
        return None if guidance is None else replace(request, guidance=guidance)


class Orchestrator:
    """Generates, assesses, stores and publishes proposals."""

    def __init__(self, proposer: Proposer, judge: Judge, rows: Rows) -> None:
        """Calls no model yet.

        Args:
            proposer, judge: generate and assess the proposal.
            rows: makes runs and their events durable.
        """
        self._proposer = proposer
        self._judge = judge
        self._rows = rows

    async def propose(
        self, prompt: str, max_tokens: int, api_key: str | None, attempt: Attempt
    ) -> AsyncGenerator[Delta | Proposed | AssessedProposal, None]:
        """Runs a proposal from prompt to score, or continues an earlier attempt.

        The proposal is stored as a draft before Hermes is asked. The rows of the finished run
        replace the draft.

        Args:
            prompt: the market context.
            max_tokens: of the proposal, and of the critique unless its own bound is smaller; at
                least `proposals.MIN_COMPLETION_TOKENS`.
            api_key: the name of the key that the request came with, for the provenance.
            attempt: at the request; results of an earlier attempt are not generated again.

        Yields:
            Deltas of Phi-3, the proposal, deltas of Hermes, and finally the result.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded: if Phi-3 had finished,
                the proposal is stored, and the error has its `transaction_id`.
        """
        if attempt.state is None:
            run = ProposalRun(prompt, api_key, attempt.id)
        else:
            run = ProposalRun.resumed(prompt, attempt.state)
            if run.rating is not None:
                yield run.result(stored=True)
                return
        try:
            async with contextlib.aclosing(self._run(run, max_tokens, attempt)) as items:
                async for item in items:
                    yield item
        except SidecarError as error:
            if run.made is None and isinstance(error, InvalidRequest | QueueFull):
                # Refused before the generation.
                raise
            raise await self._store_failed(run, attempt, error) from error
        except BaseException as error:
            if run.made is not None:
                # In the background, because a cancelled request cannot wait.
                attempt.tasks.start(self._rows.commit(run.early_end(attempt, _end_reason(error))))
            raise
        yield await attempt.tasks.finish(self._finish(run, attempt))

    async def _run(
        self, run: ProposalRun, max_tokens: int, attempt: Attempt
    ) -> AsyncGenerator[Delta | Proposed, None]:
        """Generates the missing results (proposal, critique, score), and records each in the
        run."""
        deadline = attempt.deadline
        if run.made is not None:
            yield run.made
        else:
            generating = self._proposer.generate(run.prompt, max_tokens, deadline)
            async with contextlib.aclosing(generating) as items:
                async for item in items:
                    if isinstance(item, Proposed):
                        run.proposed(item)
                        draft = self._rows.commit(run.draft(attempt), preliminary=True)
                        await attempt.tasks.finish(draft)
                    yield item
        proposal = run.proposal
        assert proposal is not None
        if run.assessment is None:
            deltas: list[Delta] = []
            request = self._judge.critique_request(proposal, run.prompt, max_tokens)
            async with contextlib.aclosing(self._judge.assess(request, deadline)) as stream:
                async for delta in stream:
                    deltas.append(delta)
                    yield delta
            run.assessed(Completion.of(deltas), request, self._judge.prompts)
        run.rated(await self._judge.rate(proposal, run.prompt, deadline))

    async def _finish(self, run: ProposalRun, attempt: Attempt) -> AssessedProposal:
        stored = await self._rows.commit(run.finished(attempt))
        return run.result(stored=stored)

    async def _store_failed(
        self, run: ProposalRun, attempt: Attempt, error: SidecarError
    ) -> SidecarError:
        """Stores a failed run; returns the error, with what is stored."""
        stored = await attempt.tasks.finish(self._rows.commit(run.early_end(attempt, error.detail)))
        has_proposal = stored and run.made is not None
        return error.of_request(run.transaction_id if has_proposal else None, stored=stored)


def _second_request(request: GenerationRequest) -> GenerationRequest:
    """The same request with sampling, and with another seed."""
    temperature = max(request.temperature or 0.0, _LEAST_TEMPERATURE)
    seed = new_seed(temperature) if request.seed is None else request.seed + 1
    return replace(request, temperature=temperature, seed=seed)


def _end_reason(error: BaseException) -> str:
    """The error message for a run that an exception other than a `SidecarError` ended."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return UNFINISHED
    return f"It failed unexpectedly: {type(error).__name__}."

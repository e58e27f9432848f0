"""A proposal: Phi-3 writes it under guidance, Hermes judges it, and it is stored and published."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Final

from llm_sidecar import grounding, proposals
from llm_sidecar.db.transaction import Transaction
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
from llm_sidecar.services.events import cloud_event
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.proposal_run import UNFINISHED, AssessedProposal, ProposalRun
from llm_sidecar.services.rows import Rows
from llm_sidecar.services.score import Judge
from llm_sidecar.tasks import TaskSet
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)


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
        timeout: float,
        retry: bool,
    ) -> None:
        """Calls no model yet.

        Args:
            phi3: the model.
            examples: returns the few-shot examples in use, oldest first.
            metrics: receives every proposal.
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

    @property
    def may_repeat(self) -> bool:
        """Whether a proposal may be generated twice, so that not all deltas belong to it."""
        return self._retry or not self._phi3.valid_by_construction

    async def generate(
        self, prompt: str, max_tokens: int, deadline: Deadline | None = None
    ) -> AsyncGenerator[Delta | Proposed, None]:
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
        deadline: Deadline | None = None,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
    ) -> AsyncGenerator[Delta | Proposed, None]:
        """Generates a proposal; it is neither assessed nor stored nor published.

        Args:
            messages: the chat that asks for it; the user's turns are the market context. If it has
                no system turn, the system prompt and the few-shot examples come first.
            max_tokens: at least `proposals.MIN_COMPLETION_TOKENS`.
            deadline: of the whole request, the retry included.
            temperature: default: that of all proposals.
            top_p, seed, logprobs: see `GenerationRequest`; the default of the seed is a new one.

        Yields:
            Deltas as they are generated, including those of further attempts; finally the valid
            proposal, which is the first one if the retry fails.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        proposals.check_budget(max_tokens)
        deadline = deadline or Deadline.after(self._timeout)
        temperature = self._temperature if temperature is None else temperature
        template = GenerationRequest(
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
        context = "\n".join(one["content"] for one in messages if one["role"] == "user")
        started = False
        while True:
            request = template
            if not has_system:
                request = replace(template, messages=[*proposals.opening(examples), *messages])
            try:
                async with contextlib.aclosing(self._attempt(request, context, deadline)) as items:
                    async for item in items:
                        started = True
                        if isinstance(item, Proposed):
                            ids = (one.feedback_id for one in examples)
                            item = item._replace(examples=tuple(filter(None, ids)))
                        yield item
                return
            except InvalidRequest as error:
                # Before the first delta, the chat is too long for the model.
                if started or not examples or isinstance(error, RefusedRequest):
                    raise
                log.warning("the few-shot examples do not fit the context beside a long prompt")
                examples = ()

    async def _attempt(
        self, request: GenerationRequest, prompt: str, deadline: Deadline
    ) -> AsyncGenerator[Delta | Proposed, None]:
        """One request, a second one if a model that may ignore the guidance did so, and a retry if
        the proposal is ungrounded."""
        deltas: list[Delta] = []
        async with contextlib.aclosing(self._generated(request, deadline, deltas)) as stream:
            async for delta in stream:
                yield delta
        try:
            proposed = await self._proposed(request, deltas, prompt)
        except InvalidProposal:
            if self._phi3.valid_by_construction:
                raise
            # Greedy decoding would most likely generate the same text again.
            request = _second_request(request)
            deltas = []
            async with contextlib.aclosing(self._generated(request, deadline, deltas)) as stream:
                async for delta in stream:
                    yield delta
            proposed = await self._proposed(request, deltas, prompt)
        if again := await self._retry_request(request, prompt, proposed):
            # The other half of the time is for the assessment: a slow retry must not cause a 504.
            half, deltas = Deadline.after(deadline.remaining() / 2), []
            try:
                async with contextlib.aclosing(self._generated(again, half, deltas)) as stream:
                    async for delta in stream:
                        yield delta
                proposed = await self._proposed(again, deltas, prompt)
            except SidecarError as error:
                log.warning("the retry of an ungrounded proposal failed: %s", type(error).__name__)
        self._metrics.proposed(proposed.proposal["action"], proposed.ungrounded)
        yield proposed

    async def _generated(
        self, request: GenerationRequest, deadline: Deadline, deltas: list[Delta]
    ) -> AsyncGenerator[Delta, None]:
        """Generates; adds each delta to `deltas` too."""
        async with contextlib.aclosing(self._phi3.stream(request, deadline)) as stream:
            async for delta in stream:
                deltas.append(delta)
                yield delta

    async def _proposed(
        self, request: GenerationRequest, deltas: Sequence[Delta], prompt: str
    ) -> Proposed:
        """The valid proposal of a finished generation.

        Raises:
            InvalidRequest: the model's tokenizer needs a larger `max_tokens`.
            InvalidProposal: there is none.
        """
        completion = Completion.of(deltas)
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
        ungrounded = await asyncio.to_thread(grounding.ungrounded_fields, proposal, prompt)
        return Proposed(proposal, completion, ungrounded, request)

    async def _retry_request(
        self, request: GenerationRequest, prompt: str, first: Proposed
    ) -> GenerationRequest | None:
        """The request with guidance limited to the context; None if no retry is needed."""
        if not self._retry or not first.ungrounded:
            return None
        # A grounded ticker is always offered, even if the context has too many others.
        tickers = [] if "ticker" in first.ungrounded else [first.proposal["ticker"]]
        guidance = await asyncio.to_thread(
            proposals.grounded_guidance, prompt, tickers, request.max_tokens
        )
        return None if guidance is None else replace(request, guidance=guidance)


class Orchestrator:
    """Generates, assesses, stores and publishes proposals."""

    def __init__(
        self, proposer: Proposer, judge: Judge, rows: Rows, tasks: TaskSet, timeout: float
    ) -> None:
        """Calls no model yet.

        Args:
            proposer, judge: generate and assess the proposal.
            rows: makes runs and their events durable.
            tasks: run to completion even if the client disconnects.
            timeout: seconds that a run may take.
        """
        self._proposer = proposer
        self._judge = judge
        self._rows = rows
        self._tasks = tasks
        self._timeout = timeout

    async def propose(
        self,
        prompt: str,
        max_tokens: int,
        api_key: str | None = None,
        attempt: Attempt | None = None,
    ) -> AsyncGenerator[Delta | Proposed | AssessedProposal, None]:
        """Runs a proposal from prompt to score, or continues an earlier attempt.

        The proposal is stored as a draft before Hermes is asked. The rows of the finished run
        replace the draft.

        Args:
            prompt: the market context.
            max_tokens: of the proposal, and of the critique unless its own bound is smaller; at
                least `proposals.MIN_COMPLETION_TOKENS`.
            api_key: the name of the key that the request came with, for the provenance.
            attempt: at a request with an `Idempotency-Key`; results of an earlier attempt are not
                generated again.

        Yields:
            Deltas of Phi-3, the proposal, deltas of Hermes, and finally the result.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded: if Phi-3 had finished,
                the proposal is stored, and the error has its `transaction_id`.
        """
        attempt = attempt or Attempt(self._tasks)
        if attempt.state is None:
            run = ProposalRun(prompt, api_key)
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
                attempt.tasks.start(self._rows.commit(_early_end(run, attempt, _end_reason(error))))
            raise
        yield await attempt.tasks.finish(self._finish(run, attempt))

    async def _run(
        self, run: ProposalRun, max_tokens: int, attempt: Attempt
    ) -> AsyncGenerator[Delta | Proposed, None]:
        """Generates the missing results (proposal, critique, score), and records each in the
        run."""
        deadline = attempt.deadline or Deadline.after(self._timeout)
        if run.made is not None:
            yield run.made
        else:
            generating = self._proposer.generate(run.prompt, max_tokens, deadline)
            async with contextlib.aclosing(generating) as items:
                async for item in items:
                    if isinstance(item, Proposed):
                        run.proposed(item)
                        draft = self._rows.commit(_draft(run, attempt), preliminary=True)
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
        """Stores a finished run with the event of its assessment."""
        stored = await self._rows.commit(
            Transaction(
                run.rows(),
                [cloud_event(run.assessed_event())],
                attempt.progress(run.state()),
                replaces=str(run.transaction_id),
            )
        )
        return run.result(stored=stored)

    async def _store_failed(
        self, run: ProposalRun, attempt: Attempt, error: SidecarError
    ) -> SidecarError:
        """Stores a failed run; returns the error, with what is stored."""
        early_end = _early_end(run, attempt, error.detail)
        stored = await attempt.tasks.finish(self._rows.commit(early_end))
        has_proposal = stored and run.made is not None
        return error.of_request(run.transaction_id if has_proposal else None, stored=stored)


def _draft(run: ProposalRun, attempt: Attempt) -> Transaction:
    """The rows of a run with a proposal, as a draft, with the event `phi3.proposal.created`."""
    return Transaction(
        run.rows(UNFINISHED),
        [cloud_event(run.created_event())],
        attempt.progress(run.state()),
        draft=str(run.transaction_id),
    )


def _early_end(run: ProposalRun, attempt: Attempt, reason: str) -> Transaction:
    """The rows of a run that ended early. They are a draft if another attempt can finish the
    run."""
    transaction_id = str(run.transaction_id)
    if run.made is None:
        return Transaction(run.rows(reason))
    progress = attempt.progress(run.state())
    return Transaction(
        run.rows(reason),
        progress=progress,
        draft=None if progress is None else transaction_id,
        replaces=transaction_id,
    )


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

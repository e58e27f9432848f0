"""A run: a proposal with Hermes' critique and score, stored and published."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from llm_sidecar import timestamps
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, QueueFull, SidecarError
from llm_sidecar.event_bus import EventBus
from llm_sidecar.models.base import Completion, Delta
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.events import PROPOSAL_ASSESSED, PROPOSAL_CREATED, publish
from llm_sidecar.services.proposal_run import ProposalRun
from llm_sidecar.services.propose import Proposer
from llm_sidecar.services.rows import Rows
from llm_sidecar.services.score import Judge
from llm_sidecar.tasks import TaskSet


@dataclass(frozen=True, slots=True)
class AssessedProposal:
    """The result of a run.

    Attributes:
        transaction_id: identifies the run in rows, events and answers.
        proposal: as JSON types.
        completion: of Phi-3, with the proposal.
        assessment: Hermes' critique.
        score: Hermes' score in [0, 1].
        grounded: `true`, or the ungrounded fields separated by commas.
        stored: whether each of its rows is stored.
    """

    transaction_id: uuid.UUID
    proposal: dict[str, Any]
    completion: Completion
    assessment: Completion
    score: float
    grounded: str
    stored: bool


class Orchestrator:
    """Generates, assesses, stores and publishes proposals."""

    def __init__(
        self,
        proposer: Proposer,
        judge: Judge,
        rows: Rows,
        bus: EventBus,
        tasks: TaskSet,
        timeout: float,
    ) -> None:
        """Calls no model yet.

        Args:
            proposer, judge: generate and assess the proposal.
            rows: stores runs.
            bus: gets the events of a run.
            tasks: run to completion even if the client disconnects.
            timeout: seconds that a run may take.
        """
        self._proposer = proposer
        self._judge = judge
        self._rows = rows
        self._bus = bus
        self._tasks = tasks
        self._timeout = timeout

    async def propose(
        self, prompt: str, max_tokens: int
    ) -> AsyncGenerator[Delta | Proposed | AssessedProposal, None]:
        """One run.

        Args:
            prompt: the market context.
            max_tokens: of the proposal, and of the critique; at least
                `proposals.MAX_COMPLETION_TOKENS`.

        Yields:
            Deltas of Phi-3, the proposal, deltas of Hermes, and finally the result.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded: if Phi-3 had finished,
                the proposal is stored, and the error has its `transaction_id`.
        """
        run = ProposalRun(prompt)
        try:
            async with contextlib.aclosing(self._run(run, max_tokens)) as items:
                async for item in items:
                    yield item
        except SidecarError as error:
            if run.made is None and isinstance(error, InvalidRequest | QueueFull):
                # Refused before the generation.
                raise
            raise await self._store_failed(run, error) from error
        except BaseException as error:
            if run.made is not None:
                # In the background, because a cancelled request cannot wait.
                self._tasks.start(self._rows.store(run.rows(_end_reason(error))))
            raise
        yield await self._tasks.finish(self._finish(run))

    async def _run(
        self, run: ProposalRun, max_tokens: int
    ) -> AsyncGenerator[Delta | Proposed, None]:
        """Generates the proposal, the critique and the score, and records each in the run."""
        deadline = Deadline.after(self._timeout)
        generating = self._proposer.generate(run.prompt, max_tokens, deadline)
        async with contextlib.aclosing(generating) as items:
            async for item in items:
                if isinstance(item, Proposed):
                    run.proposed(item)
                    created = {**item.proposal, "transaction_id": str(run.transaction_id)}
                    await self._tasks.finish(publish(self._bus, PROPOSAL_CREATED, created))
                yield item
        proposal = run.proposal
        assert proposal is not None
        deltas: list[Delta] = []
        assessing = self._judge.assess(
            proposal, run.prompt, max_tokens=max_tokens, deadline=deadline
        )
        async with contextlib.aclosing(assessing) as stream:
            async for delta in stream:
                deltas.append(delta)
                yield delta
        run.assessed(Completion.of(deltas))
        run.scored(await self._judge.rate(proposal, run.prompt, deadline))

    async def _finish(self, run: ProposalRun) -> AssessedProposal:
        """Stores a finished run, and publishes its assessment."""
        assert run.made is not None
        assert run.assessment is not None
        assert run.score is not None
        stored = await self._rows.store(run.rows())
        event = {
            "proposal_transaction_id": str(run.transaction_id),
            "assessment_text": run.assessment.text,
            "timestamp": timestamps.now().isoformat(),
        }
        await publish(self._bus, PROPOSAL_ASSESSED, event)
        return AssessedProposal(
            run.transaction_id,
            run.made.proposal,
            run.made.completion,
            run.assessment,
            run.score,
            run.made.grounded,
            stored,
        )

    async def _store_failed(self, run: ProposalRun, error: SidecarError) -> SidecarError:
        """Stores a failed run; returns the error, with what is stored."""
        stored = await self._tasks.finish(self._rows.store(run.rows(error.detail)))
        has_proposal = stored and run.made is not None
        return error.of_request(run.transaction_id if has_proposal else None, stored=stored)


def _end_reason(error: BaseException) -> str:
    """The error message for a run that an exception other than a `SidecarError` ended."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "The client disconnected, or the server ended, before Hermes had finished."
    return f"It failed unexpectedly: {type(error).__name__}."

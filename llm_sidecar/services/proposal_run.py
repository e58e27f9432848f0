"""One run from a prompt to an assessed proposal: its progress, its rows and its events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from pydantic import TypeAdapter

from llm_sidecar import timestamps
from llm_sidecar.db import HermesScoreSchema, Latencies, OrchestratorRunSchema, ProposalSchema
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.models.base import Completion, GenerationRequest
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.events import ProposalAssessed, ProposalCreated, cloud_event
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.provenance import Provenance
from llm_sidecar.services.rows import Row
from llm_sidecar.services.score import Rating

_COMPLETION: Final = TypeAdapter(Completion)
UNFINISHED: Final = "The client disconnected, or the server ended, before Hermes had finished."
"""The error of a run that neither finished nor failed."""


@dataclass(frozen=True, slots=True)
class AssessedProposal:
    """The result of a run.

    Attributes:
        transaction_id: identifies the run in rows, events and answers.
        proposal: as JSON types.
        completion: of Phi-3, with the proposal.
        assessment: Hermes' critique.
        rating: Hermes' score.
        grounded: `true`, or the ungrounded fields separated by commas.
        stored: whether each of its rows is stored.
    """

    transaction_id: uuid.UUID
    proposal: dict[str, Any]
    completion: Completion
    assessment: Completion
    rating: Rating
    grounded: str
    stored: bool


@dataclass(slots=True)
class ProposalRun:
    """A run; missing results are None.

    Attributes:
        prompt: the market context.
        api_key: the name of the key that the request came with.
        transaction_id: identifies the run in rows, events and answers.
        made: Phi-3's valid proposal.
        assessment: Hermes' critique.
        rating: Hermes' score.
        provenance: the provenance of proposal and critique.
    """

    prompt: str
    api_key: str | None = None
    transaction_id: uuid.UUID = field(default_factory=uuid.uuid4)
    made: Proposed | None = None
    assessment: Completion | None = None
    rating: Rating | None = None
    provenance: Provenance | None = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    @classmethod
    def resumed(cls, prompt: str, state: Mapping[str, Any]) -> Self:
        """The run that an earlier attempt has begun, from its `state`."""
        assessment, rating = state["assessment"], state["rating"]
        completion = _COMPLETION.validate_python(state["completion"])
        return cls(
            prompt,
            transaction_id=uuid.UUID(state["transaction_id"]),
            made=Proposed(state["proposal"], completion, tuple(state["ungrounded"])),
            assessment=None if assessment is None else _COMPLETION.validate_python(assessment),
            rating=None if rating is None else Rating(**rating),
            provenance=Provenance.model_validate(state["provenance"]),
            _seconds=state["seconds"],
        )

    def state(self) -> dict[str, Any]:
        """The state for `resumed`, as JSON types. The run must have a proposal."""
        assert self.made is not None
        assert self.provenance is not None
        return {
            "transaction_id": str(self.transaction_id),
            "proposal": self.made.proposal,
            "completion": asdict(self.made.completion),
            "ungrounded": list(self.made.ungrounded),
            "assessment": None if self.assessment is None else asdict(self.assessment),
            "rating": None if self.rating is None else self.rating._asdict(),
            "provenance": self.provenance.model_dump(),
            "seconds": self._seconds,
        }

    @property
    def proposal(self) -> dict[str, Any] | None:
        """The proposal as JSON types."""
        return None if self.made is None else self.made.proposal

    def proposed(self, made: Proposed) -> None:
        """Records Phi-3's proposal."""
        self.made = made
        self.provenance = Provenance.of(made, self.api_key)
        self._lap("proposal")

    def assessed(
        self, assessment: Completion, request: GenerationRequest, prompts: Prompts
    ) -> None:
        """Records Hermes' critique, the request that it answers, and the prompts in it."""
        assert self.provenance is not None
        self.assessment = assessment
        self.provenance = self.provenance.with_critique(request, assessment, prompts)
        self._lap("assessment")

    def rated(self, rating: Rating) -> None:
        """Records Hermes' score."""
        self.rating = rating
        self._lap("score")

    def created_event(self) -> ProposalCreated:
        """The payload of `phi3.proposal.created`."""
        assert self.made is not None
        return ProposalCreated(**self.made.proposal, transaction_id=self.transaction_id)

    def assessed_event(self) -> ProposalAssessed:
        """The payload of `phi3.proposal.assessed`."""
        assert self.assessment is not None
        assert self.rating is not None
        assert self.rating.answer_mass is not None
        return ProposalAssessed(
            proposal_transaction_id=self.transaction_id,
            assessment_text=self.assessment.text,
            timestamp=timestamps.now(),
            score=self.rating.score,
            answer_mass=self.rating.answer_mass,
        )

    def result(self, *, stored: bool) -> AssessedProposal:
        """The result of a finished run."""
        assert self.made is not None
        assert self.assessment is not None
        assert self.rating is not None
        return AssessedProposal(
            self.transaction_id,
            self.made.proposal,
            self.made.completion,
            self.assessment,
            self.rating,
            self.made.grounded,
            stored,
        )

    def draft(self, attempt: Attempt) -> Transaction:
        """Stores a proposal before its critique, with the event `phi3.proposal.created`."""
        return Transaction(
            self.rows(UNFINISHED),
            [cloud_event(self.created_event(), self.transaction_id)],
            attempt.progress(self.state()),
            draft=str(self.transaction_id),
        )

    def finished(self, attempt: Attempt) -> Transaction:
        """Replaces the draft, with the event `phi3.proposal.assessed`."""
        return Transaction(
            self.rows(),
            [cloud_event(self.assessed_event(), self.transaction_id)],
            attempt.progress(self.state()),
            replaces=str(self.transaction_id),
        )

    def early_end(self, attempt: Attempt, reason: str) -> Transaction:
        """Stores a run that ended early: as a draft if another attempt can finish it."""
        if self.made is None:
            return Transaction(self.rows(reason))
        transaction_id = str(self.transaction_id)
        progress = attempt.progress(self.state())
        return Transaction(
            self.rows(reason),
            progress=progress,
            draft=None if progress is None else transaction_id,
            replaces=transaction_id,
        )

    def rows(self, error: str | None = None) -> list[Row]:
        """The rows to store.

        The rows of a finished run have the run's id as their key, so that a run is stored once. A
        run that ended early may continue later, so its rows have keys of their own.

        Args:
            error: why the run ended early, or None for a finished one.

        Returns:
            The run, then the proposal and the score if there are any. The status of the run is
            `success`; after an error `partial` if there is a proposal, else `error`.
        """
        rows: list[Row] = [self._run_row(error)]
        if self.made is not None:
            rows.append(self._proposal_row(self.made))
        if self.rating is not None:
            rows.append(
                HermesScoreSchema(
                    run_id=str(self.transaction_id),
                    rationale=self._assessment_text() or "",
                    **self.rating.columns(),
                )
            )
        return rows if error is not None else [row.keyed(self.transaction_id.hex) for row in rows]

    def _run_row(self, error: str | None) -> OrchestratorRunSchema:
        output = ""
        if self.proposal is not None:
            output = json.dumps(
                {
                    "proposal": self.proposal,
                    "assessment": self._assessment_text(),
                    "score": None,
                    **({} if self.rating is None else self.rating.columns()),
                }
            )
        status = "success" if error is None else "partial" if output else "error"
        return OrchestratorRunSchema(
            run_id=str(self.transaction_id),
            input_query=self.prompt,
            final_output=output,
            status=status,
            error_message=error,
        )

    def _proposal_row(self, made: Proposed) -> ProposalSchema:
        assert self.provenance is not None
        return ProposalSchema(
            transaction_id=str(self.transaction_id),
            prompt=self.prompt,
            proposal=made.proposal,
            assessment=self._assessment_text() or "",
            **({} if self.rating is None else self.rating.columns()),
            model=made.completion.model,
            adapter=made.completion.adapter,
            latencies=Latencies(**self._seconds),
            grounded=made.grounded,
            provenance=self.provenance.model_dump(),
        )

    def _assessment_text(self) -> str | None:
        return None if self.assessment is None else self.assessment.text

    def _lap(self, name: str) -> None:
        """Records the seconds since the last phase."""
        now = time.monotonic()
        self._seconds[name] = now - self._last
        self._last = now

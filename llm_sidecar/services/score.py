"""Hermes' critique and score of a proposal."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm_sidecar import hermes_plugin
from llm_sidecar.db import HermesScoreSchema
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.base import ChatModel, Delta, GenerationRequest, new_seed
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.services.critique import whole_sentences
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.rows import Rows
from llm_sidecar.telemetry.metrics import MetricsSink


class Rating(NamedTuple):
    """A score in [0, 1], and whether it can be relied on.

    Attributes:
        answer_mass: the probability of the eleven answers 0 to 10 in total, in [0, 1]; None for a
            score by an older version.
        reliable: whether the answer mass was at least MIN_ANSWER_MASS.
    """

    score: float
    answer_mass: float | None
    reliable: bool = True

    def columns(self) -> dict[str, Any]:
        """The columns of rows."""
        return {
            "score": self.score,
            "answer_mass": self.answer_mass,
            "score_reliable": self.reliable,
        }


@dataclass(frozen=True, slots=True)
class ScoredProposal:
    """A score, and the id under which it is stored, if `stored`."""

    proposal_id: uuid.UUID
    rating: Rating
    stored: bool


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """How Hermes judges.

    Attributes:
        temperature: of the critique; 0 is greedy, None the model's own sampling.
        critique_tokens: maximum number of tokens of a critique.
        min_answer_mass: answer mass from which a score is reliable.
        prompts: for the model.
    """

    temperature: float | None = None
    critique_tokens: int = 96
    min_answer_mass: float = 0.5
    prompts: Prompts = hermes_plugin.PROMPTS


class Judge:
    """Critiques and scores proposals with Hermes."""

    def __init__(
        self,
        hermes: ChatModel,
        rows: Rows,
        metrics: MetricsSink,
        options: JudgeOptions,
    ) -> None:
        """Calls no model yet.

        Args:
            hermes: the model.
            rows: stores the scores of `score`.
            metrics: receives every score.
            options: how to judge.
        """
        self._hermes = hermes
        self._rows = rows
        self._metrics = metrics
        self._options = options

    @property
    def prompts(self) -> Prompts:
        """The prompts for the model."""
        return self._options.prompts

    def critique_request(
        self, proposal: Mapping[str, Any], context: str, max_tokens: int
    ) -> GenerationRequest:
        """The request for Hermes' critique of a proposal."""
        messages = hermes_plugin.build_messages(
            self.prompts.critique_task, proposal, context, self.prompts.system
        )
        temperature = self._options.temperature
        return GenerationRequest(
            messages,
            min(max_tokens, self._options.critique_tokens),
            temperature=temperature,
            seed=new_seed(temperature),
        )

    def assess(self, request: GenerationRequest, deadline: Deadline) -> AsyncGenerator[Delta, None]:
        """Streams the critique that a request asks for; the deadline never truncates it.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        return whole_sentences(self._hermes.stream(request, deadline))

    async def rate(
        self, proposal: Mapping[str, Any], context: str | None, deadline: Deadline
    ) -> Rating:
        """Hermes' score of a proposal: deterministic, from one forward pass, not stored.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        messages = hermes_plugin.score_messages(proposal, context, self.prompts)
        scores = await self._hermes.score_choices(messages, hermes_plugin.SCORE_ANSWERS, deadline)
        score = hermes_plugin.read_score(scores)
        reliable = hermes_plugin.is_reliable(scores, self._options.min_answer_mass)
        # Rounding can take the sum a little above 1.
        mass = min(1.0, scores.mass)
        self._metrics.scored(score, mass, reliable=reliable)
        return Rating(score, mass, reliable)

    async def score(
        self, proposal: Mapping[str, Any], context: str | None, attempt: Attempt
    ) -> ScoredProposal:
        """Scores a proposal and stores the score under the proposal's own id, or a new one.

        Args:
            proposal: as JSON types.
            context: the market context.
            attempt: at the request.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        if attempt.state is not None:
            kept = attempt.state
            # An older version kept no more than the score.
            rating = Rating(kept["score"], kept.get("answer_mass"), kept.get("reliable", True))
            return ScoredProposal(uuid.UUID(kept["proposal_id"]), rating, stored=True)
        proposal_id = _uuid_or_none(proposal.get("id")) or attempt.id
        try:
            rating = await self.rate(proposal, context, attempt.deadline)
        except InvalidRequest as error:
            # A model's errors are about the prompt, but the caller sent a proposal and a context.
            problem = error.problem if context is None else f"with the context {error.problem}"
            raise InvalidRequest(
                problem, field="proposal", exceeds_context=error.exceeds_context
            ) from None
        rationale = proposal.get("rationale")
        row = HermesScoreSchema(
            run_id=str(proposal_id),
            rationale=rationale if isinstance(rationale, str) else "",
            **rating.columns(),
        ).keyed(attempt.id.hex)
        progress = attempt.progress({"proposal_id": str(proposal_id), **rating._asdict()})
        storing = self._rows.commit(Transaction([row], progress=progress))
        return ScoredProposal(proposal_id, rating, await attempt.tasks.finish(storing))


def _uuid_or_none(value: object) -> uuid.UUID | None:
    try:
        return uuid.UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None

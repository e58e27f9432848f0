"""The composition root: builds the parts from the settings, starts and stops them in order, and
walks a request through them."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import ValidationError

from llm_sidecar import __version__, hermes_plugin, proposals, timestamps
from llm_sidecar.db import HermesScoreSchema, Phi3FeedbackSchema, PublishedFeedback, table_of
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import (
    AdapterRejected,
    DatabaseUnavailable,
    InvalidRequest,
    ModelUnavailable,
    NotFound,
    QueueFull,
    SidecarError,
)
from llm_sidecar.event_bus import EventBus
from llm_sidecar.input_model import check_length, longest_payload, summary
from llm_sidecar.logs import start_detached, start_owned
from llm_sidecar.models import adapters, files
from llm_sidecar.models.adapter_state import RememberedAdapter
from llm_sidecar.models.local.model import Completion, HostLimits, ModelHost
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.archive import Archive
from llm_sidecar.services.examples import Outcome
from llm_sidecar.services.proposal_run import ProposalRun, Row
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.base import Instrument
from llm_sidecar.telemetry.calls import Observers
from llm_sidecar.telemetry.metrics import MetricsSink, NoMetrics
from llm_sidecar.tts.listeners import AudioListeners
from llm_sidecar.tts.remote import RemoteVoice
from llm_sidecar.tts.speaker import Speaker

T = TypeVar("T")
log = logging.getLogger(__name__)

PROPOSAL_CREATED: Final = "phi3.proposal.created"
PROPOSAL_ASSESSED: Final = "phi3.proposal.assessed"
FEEDBACK_SUBMITTED: Final = "phi3.feedback.submitted"
_STORE_AGAIN: Final = 1.0
"""Seconds after which feedback that could not be stored is tried again."""


@dataclass(frozen=True, slots=True)
class AssessedProposal:
    """The result of one run from a prompt to an assessed proposal.

    Attributes:
        grounded: `true`, or the ungrounded fields separated by commas.
        stored: whether each of its rows is stored.
    """

    transaction_id: uuid.UUID
    proposal: dict[str, Any]
    completion: Completion
    assessment: Completion
    score: float
    grounded: str
    stored: bool = True


@dataclass(frozen=True, slots=True)
class ScoredProposal:
    """A score in [0, 1], and the id under which it is stored, if `stored`."""

    proposal_id: uuid.UUID
    score: float
    stored: bool


class Sidecar:
    """The models, the voice, the event bus and the database, and what they do together."""

    def __init__(
        self,
        settings: Settings,
        metrics: MetricsSink | None = None,
        telemetry: Instrument | None = None,
    ) -> None:
        """Builds the parts; opens, connects and loads nothing.

        Args:
            settings: of all parts.
            metrics: hears of calls, proposals and scores.
            telemetry: hears of model calls and of workers' deaths; its owner starts and stops it.
        """
        telemetry = telemetry or Instrument()
        self._began = time.monotonic()
        self.settings = settings
        self._metrics = metrics or NoMetrics()
        observers = Observers(self._metrics, telemetry)
        limits = HostLimits(
            queue_length=settings.queue_length,
            request_timeout=settings.request_timeout,
            load_wait=settings.load_wait,
            load_timeout=settings.load_timeout,
        )
        self.phi3 = ModelHost(
            "phi3",
            lambda: files.locate_phi3(settings),
            device=settings.device,
            threads=settings.phi3_threads,
            limits=limits,
            warm_up=GenerationRequest(proposals.build_messages("Hello."), 1, proposals.GUIDANCE),
            prefix=lambda: proposals.prefix(self.archive.examples, settings.phi3_temperature),
            observer=observers,
            on_death=telemetry.worker_died,
        )
        self.hermes = ModelHost(
            "hermes",
            lambda: files.locate_hermes(settings),
            device=settings.device,
            threads=settings.hermes_threads,
            limits=limits,
            warm_up=GenerationRequest(hermes_plugin.chat_messages("Hello."), 1),
            observer=observers,
            on_death=telemetry.worker_died,
        )
        self.bus = EventBus(settings.redis_url.get_secret_value())
        self._connecting: asyncio.Task[None] | None = None
        self.remote_voice = None if settings.tts_voice == "espeak" else RemoteVoice(self.bus)
        self.speaker = Speaker(
            self.bus,
            voice=settings.tts_voice,
            remote=self.remote_voice,
            queue_length=settings.tts_queue_length,
            timeout=settings.tts_timeout,
        )
        self.listeners = AudioListeners(self.bus, settings.max_audio_listeners)
        self.archive = Archive(
            settings.lancedb_uri,
            log_dir=settings.lancedb_log_dir,
            examples=files.few_shot_examples(settings),
            examples_from_bus=settings.examples_from_bus,
            context_length=lambda: files.phi3_context_length(settings),
            on_examples=self._prepare_examples,
        )
        # Marks the sidecar's own events as long as the database's id is not known.
        self._name = uuid.uuid4().hex
        self._preparing: asyncio.Task[None] | None = None
        self._swapping = asyncio.Lock()
        self._swaps: set[asyncio.Task[None]] = set()
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._last_refusal: tuple[Path | None, float, str] = (None, -math.inf, "")
        self._remembered = RememberedAdapter(self.archive.log_folder, settings.adapter_dir)

    def _prepare_examples(self) -> None:
        # A worker that prepares one already gives it up for the newer.
        self._preparing = start_detached(self.phi3.prepare())

    async def start(self) -> None:
        """Starts the parts; none of them being away keeps the others from starting."""
        if self.settings.demo:
            log.warning("SIDECAR_DEMO is on: a demo model answers where no model is configured")
        self.archive.start()
        if remembered := self._remembered.load():
            self.phi3.begin_with(remembered)
        await self.bus.subscribe(FEEDBACK_SUBMITTED, self._store_published_feedback)
        if self.remote_voice is not None:
            await self.remote_voice.start()
        # Its first attempt may take seconds where Redis is away.
        self._connecting = start_detached(self.bus.start())
        if self.settings.preload:
            for host in (self.phi3, self.hermes):
                try:
                    host.preload()
                except ModelUnavailable as error:
                    log.error("%s", error.detail)

    def refuse_waiting(self) -> None:
        """Refuses requests that wait for a model to load, from now on; call it when the server
        drains."""
        self.phi3.refuse_waiting()
        self.hermes.refuse_waiting()

    async def close(self) -> None:
        """Lets running generations end within the grace period, then stops every part."""
        grace = self.settings.shutdown_grace
        # Models first: what they still answer is yet to be stored and told.
        await asyncio.gather(self.phi3.close(grace), self.hermes.close(grace))
        while self._unfinished:
            await asyncio.wait(self._unfinished)
        if self._swaps:
            # Closing the models has ended them, but one may still save the adapter's name.
            await asyncio.wait(self._swaps)
        # What is still spoken goes out on the bus.
        await self.speaker.close()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self.bus.close()
        await self.archive.close()

    async def generate_phi3(
        self, prompt: str, max_tokens: int, deadline: Deadline | None = None
    ) -> Proposed:
        """A proposal alone: not assessed, not stored, not published."""
        proposed = await proposals.propose(
            self.phi3,
            prompt,
            self.archive.examples,
            max_tokens=max_tokens,
            temperature=self.settings.phi3_temperature,
            deadline=deadline or Deadline.after(self.settings.request_timeout),
            retry=self.settings.grounding == "retry",
        )
        self._metrics.proposed(proposed.proposal["action"], proposed.ungrounded)
        return proposed

    async def generate_hermes(self, prompt: str, max_tokens: int) -> Completion:
        """Hermes' answer to a free question."""
        temperature = self.settings.hermes_temperature
        return await hermes_plugin.chat(
            self.hermes, prompt, max_tokens=max_tokens, temperature=temperature
        )

    async def propose(self, prompt: str, max_tokens: int) -> AssessedProposal:
        """A proposal with Hermes' critique and score, stored and published to the other services.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded: if Phi-3 had finished,
                the proposal is stored under the error's `transaction_id`.
        """
        run = ProposalRun(prompt)
        try:
            result = await self._run(run, max_tokens)
        except SidecarError as error:
            if run.proposal is None and isinstance(error, InvalidRequest | QueueFull):
                # Refused before anything was generated.
                raise
            raise await self._keep_failed(run, error) from error
        except BaseException as error:
            if run.proposal is not None:
                # In the background: nobody waits for a cancelled request.
                self._to_the_end(self._keep_all(run.rows(_why_it_ended(error))))
            raise
        stored = await asyncio.shield(self._to_the_end(self._finish(run, result)))
        return replace(result, stored=stored)

    async def _run(self, run: ProposalRun, max_tokens: int) -> AssessedProposal:
        """Makes the proposal, the assessment and the score, and notes each in the run."""
        deadline = Deadline.after(self.settings.request_timeout)
        proposed = await self.generate_phi3(run.prompt, max_tokens, deadline)
        run.proposed(proposed)
        proposal = proposed.proposal
        created = {**proposal, "transaction_id": str(run.transaction_id)}
        await asyncio.shield(self._to_the_end(self._publish(PROPOSAL_CREATED, created)))
        assessment = await hermes_plugin.assess(
            self.hermes,
            proposal,
            run.prompt,
            max_tokens=max_tokens,
            temperature=self.settings.hermes_temperature,
            deadline=deadline,
        )
        run.assessed(assessment)
        score = await self._score(proposal, run.prompt, deadline)
        run.scored(score)
        return AssessedProposal(
            run.transaction_id, proposal, proposed.completion, assessment, score, proposed.grounded
        )

    async def _finish(self, run: ProposalRun, result: AssessedProposal) -> bool:
        """Stores a finished run, publishes its assessment; returns whether all rows are stored."""
        stored = await self._keep_all(run.rows())
        await self._publish(
            PROPOSAL_ASSESSED,
            {
                "proposal_transaction_id": str(result.transaction_id),
                "assessment_text": result.assessment.text,
                "timestamp": timestamps.now().isoformat(),
            },
        )
        return stored

    async def _keep_failed(self, run: ProposalRun, error: SidecarError) -> SidecarError:
        """Stores a failed run; returns the error, with what is stored."""
        keeping = self._to_the_end(self._keep_all(run.rows(error.detail)))
        stored = await asyncio.shield(keeping)
        has_proposal = stored and run.proposal is not None
        return error.of_request(run.transaction_id if has_proposal else None, stored=stored)

    async def score(self, proposal: Mapping[str, Any], context: str | None) -> ScoredProposal:
        """Scores a proposal and stores the score under the proposal's own id, or a new one."""
        proposal_id = _uuid_or_none(proposal.get("id")) or uuid.uuid4()
        try:
            score = await self._score(proposal, context)
        except InvalidRequest as error:
            # An engine's errors are about the prompt, but the caller sent these fields.
            fields = "proposal: it" if context is None else "proposal and context: their text"
            raise InvalidRequest(f"{fields} {error.detail.removeprefix('prompt: it ')}") from None
        rationale = proposal.get("rationale")
        row = HermesScoreSchema(
            run_id=str(proposal_id),
            score=score,
            rationale=rationale if isinstance(rationale, str) else "",
        )
        stored = await asyncio.shield(self._to_the_end(self._keep_all([row])))
        return ScoredProposal(proposal_id, score, stored)

    async def _score(
        self, proposal: Mapping[str, Any], context: str | None, deadline: Deadline | None = None
    ) -> float:
        score = await hermes_plugin.score(self.hermes, proposal, context, deadline)
        self._metrics.scored(score)
        return score

    async def submit_feedback(
        self, feedback: Phi3FeedbackSchema, author: str | None = None
    ) -> tuple[str, Outcome]:
        """Stores feedback, then tells the other services.

        Args:
            feedback: what to store.
            author: the name of the API key that it came with.

        Returns:
            Its feedback_id, and whether it is a few-shot example or the reason why not.

        Raises:
            DatabaseUnavailable: it is not stored; the caller still has it.
        """
        feedback = feedback.written_by(author)
        # With its id, by which whoever hears of it knows it again.
        feedback_id = str(feedback.as_row()["feedback_id"])
        outcome = await self.archive.append_feedback(feedback)
        stored_in = self.archive.database_id or self._name
        event = {"feedback_id": feedback_id, "stored_in": stored_in}
        if author is not None:
            # Omitted otherwise, because version 0.1.0 refuses the field.
            event["author"] = author
        await self._publish(FEEDBACK_SUBMITTED, feedback.model_dump(mode="json") | event)
        return feedback_id, outcome

    async def withdraw_feedback(self, feedback_id: str) -> None:
        """Withdraws feedback: it is neither a few-shot example nor training data from then on.

        Raises:
            NotFound: there is no such feedback.
            DatabaseUnavailable: that is not known, or the withdrawal is not stored.
        """
        if not await self.archive.withdraw(feedback_id):
            raise NotFound("There is no feedback with this feedback_id.")

    async def swap_adapter(self, name: str | None = None) -> datetime.date | None:
        """Takes an adapter of Phi-3's into use, and remembers it for the next start.

        Args:
            name: `YYYYMMDD` or `YYYYMMDD-dpo`; the newest where none is named, and none where
                there is none.

        Returns:
            The date of the adapter in use.

        Raises:
            AdapterRejected: it cannot be loaded, and the one in use goes on.
            ModelUnavailable: Phi-3 is missing, or the server is shutting down.
        """
        # It runs to completion even if the client disconnects.
        swapping = start_owned(self._swap_adapter(name))
        self._swaps.add(swapping)
        swapping.add_done_callback(self._swaps.discard)
        await asyncio.shield(swapping)
        return self.adapter_date()

    async def _swap_adapter(self, name: str | None) -> None:
        asked = time.monotonic()
        async with self._swapping:
            try:
                # The folder may be on a slow disk.
                chosen = await asyncio.to_thread(self._choose_adapter, name)
                if chosen != self.phi3.adapter:
                    await self._take_adapter(chosen, asked)
            except SidecarError as error:
                log.warning("phi3 keeps its adapter: %s", error.detail)
                raise
            await asyncio.to_thread(self._remembered.save, chosen)

    async def _take_adapter(self, chosen: Path | None, asked: float) -> None:
        """Switches to an adapter that is not in use."""
        refused, when, why = self._last_refusal
        if refused == chosen and when > asked:
            # A client timed out and retried while this adapter was still loading.
            raise AdapterRejected(why)
        began, previous = time.monotonic(), self.phi3.adapter
        try:
            await self.phi3.swap_adapter(chosen)
        except AdapterRejected as error:
            self._last_refusal = chosen, time.monotonic(), error.detail
            raise
        fields = {
            "model": "phi3",
            "previous_adapter": None if previous is None else previous.name,
            "adapter": None if chosen is None else chosen.name,
            "seconds": round(time.monotonic() - began, 1),
        }
        log.info(
            "phi3 changed its adapter from %s to %s in %.1f s",
            fields["previous_adapter"] or "none",
            fields["adapter"] or "none",
            fields["seconds"],
            extra=fields,
        )

    def _choose_adapter(self, name: str | None) -> Path | None:
        folder = self.settings.adapter_dir
        if name is None:
            return adapters.get_latest_adapter_dir(folder)
        return adapters.find_adapter_dir(folder, name)

    def adapter_date(self) -> datetime.date | None:
        """The date of Phi-3's adapter in use."""
        adapter = self.phi3.adapter
        return None if adapter is None else adapters.adapter_date(adapter)

    def missing(self) -> dict[str, str]:
        """Why the next proposal or feedback would fail, by part; empty if both would succeed.

        Outages of Redis or LanceDB do not count, because events and rows wait for them.
        """
        reasons = {
            "phi3": self.phi3.not_ready(),
            "hermes": self.hermes.not_ready(),
            "database": self.archive.refusal(),
        }
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def status(self) -> Literal["ok", "partial_error", "error"]:
        """The overall state: `error` if no model is available."""
        missing = self.missing()
        if {"phi3", "hermes"} <= set(missing):
            return "error"
        whole = self.bus.connected and self.speaker.available() and self.archive.is_whole()
        return "ok" if whole and not missing else "partial_error"

    def health(self) -> dict[str, Any]:
        """The overall state and the state of each part: JSON types only."""
        models = {"phi3": self.phi3.status(), "hermes": self.hermes.status()}
        bus = self.bus.status()
        date = self.adapter_date()
        return {
            "status": self.status(),
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "hermes_loaded": models["hermes"]["state"] == "ready",
            "phi3_loaded": models["phi3"]["state"] == "ready",
            "phi3_model_file_exists": files.phi3_model_file_exists(self.settings),
            "device": models["phi3"]["device"] or self.settings.device,
            "phi3_adapter_date": None if date is None else date.isoformat(),
            "mean_hermes_score_last_24h": self.archive.mean_score,
            "num_hermes_scores_last_24h": self.archive.num_scores,
            "models": models,
            "event_bus": bus,
            "database": self.archive.status(),
            "speech": {
                **self.speaker.status(),
                "workers": [] if self.remote_voice is None else self.remote_voice.workers(),
                "listeners": self.listeners.count,
                "lost": self.listeners.lost,
            },
        }

    async def _store_published_feedback(self, payload: str) -> None:
        """Stores feedback that another service publishes.

        Feedback of a sidecar on the same database is stored already, so the message only causes a
        refresh of the examples. A message with a forged `stored_in` is not stored.
        """
        if len(payload) > longest_payload(self.settings.max_prompt_chars):
            self.bus.refuse(FEEDBACK_SUBMITTED, "it is too long")
            return
        try:
            feedback = PublishedFeedback.model_validate_json(payload)
            check_length(feedback, self.settings.max_prompt_chars)
        except ValidationError as error:
            self.bus.refuse(FEEDBACK_SUBMITTED, summary(error))
            return
        if feedback.stored_in is not None and feedback.stored_in in (
            self._name,
            self.archive.database_id,
        ):
            self.archive.refresh_soon()
            return
        if feedback.feedback_id is None and not json.loads(payload).get("timestamp"):
            # Each sidecar that hears it gives it a time of its own, and all of them the same id.
            feedback_id = hashlib.sha256(payload.encode()).hexdigest()
            feedback = feedback.model_copy(update={"feedback_id": feedback_id})
        said = False
        while True:
            try:
                await self.archive.append_published(feedback)
            except DatabaseUnavailable as error:
                # Nobody would send it again, so it waits, and what comes after it in the queue.
                if not said:
                    log.error("feedback of another service waits: %s", error.detail)
                said = True
                await asyncio.sleep(_STORE_AGAIN)
            else:
                return

    def _to_the_end(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that runs to completion even if the request is cancelled; `close` waits for it."""
        task = start_owned(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return task

    async def _keep_all(self, rows: Sequence[Row]) -> bool:
        """Stores rows, within a few seconds; returns whether each of them is stored."""
        return all(await asyncio.gather(*map(self._keep, rows)))

    async def _keep(self, row: Row) -> bool:
        """Stores a row; a failure is logged and counted, and never fails the request."""
        try:
            await self.archive.append(row)
        except DatabaseUnavailable as error:
            table = table_of(row)
            log.error("a row of %s is not stored: %s", table, error.detail)
            self._metrics.row_lost(table)
            return False
        return True

    async def _publish(self, channel: str, payload: Mapping[str, Any]) -> None:
        await self.bus.publish(channel, json.dumps(payload))


def _why_it_ended(error: BaseException) -> str:
    """The error message for a run that ended with another exception than a `SidecarError`."""
    if isinstance(error, asyncio.CancelledError):
        return "The client disconnected, or the server ended, before Hermes had finished."
    return f"It failed unexpectedly: {type(error).__name__}."


def _uuid_or_none(value: object) -> uuid.UUID | None:
    try:
        return uuid.UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None

"""The composition root: builds the parts from the settings, starts and stops them in order, and
walks a request through them."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llm_sidecar import hermes_plugin, loader, proposals
from llm_sidecar.archive import Archive
from llm_sidecar.db import (
    HermesScoreSchema,
    Latencies,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
)
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import DatabaseUnavailable, ModelUnavailable, SidecarError
from llm_sidecar.event_bus import EventBus
from llm_sidecar.model_host import Completion, HostLimits, ModelHost
from llm_sidecar.remembered import RememberedAdapter
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import Observers
from llm_sidecar.telemetry.instruments import Instrument
from llm_sidecar.telemetry.metrics import MetricsSink, NoMetrics
from llm_sidecar.tts.listeners import AudioListeners
from llm_sidecar.tts.remote import RemoteVoice
from llm_sidecar.tts.speaker import Speaker

log = logging.getLogger(__name__)

PROPOSAL_CREATED: Final = "phi3.proposal.created"
PROPOSAL_ASSESSED: Final = "phi3.proposal.assessed"
FEEDBACK_SUBMITTED: Final = "phi3.feedback.submitted"
_STORE_AGAIN: Final = 1.0
"""Seconds after which feedback that could not be stored is tried again."""


@dataclass(frozen=True, slots=True)
class AssessedProposal:
    """What one walk from prompt to judged proposal gives."""

    transaction_id: uuid.UUID
    proposal: dict[str, Any]
    completion: Completion
    assessment: Completion
    score: float


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
            lambda: loader.locate_phi3(settings),
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
            lambda: loader.locate_hermes(settings),
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
            examples=loader.few_shot_examples(settings),
            on_examples=self._prepare_examples,
        )
        self._preparing: asyncio.Task[None] | None = None
        self._swapping = asyncio.Lock()
        self._swaps: set[asyncio.Task[None]] = set()
        self._remembered = RememberedAdapter(self.archive.log_folder, settings.adapter_dir)

    def _prepare_examples(self) -> None:
        # A worker that prepares one already gives it up for the newer.
        self._preparing = asyncio.create_task(self.phi3.prepare(), context=contextvars.Context())

    async def start(self) -> None:
        """Starts the parts; none of them being away keeps the others from starting."""
        if self.settings.demo:
            log.warning("SIDECAR_DEMO is on: where no model is configured, a toy answers")
        self.archive.start()
        if remembered := self._remembered.load():
            self.phi3.begin_with(remembered)
        await self.bus.subscribe(FEEDBACK_SUBMITTED, self._store_published_feedback)
        if self.remote_voice is not None:
            await self.remote_voice.start()
        # Its first attempt may take seconds where Redis is away.
        self._connecting = asyncio.create_task(self.bus.start())
        if self.settings.preload:
            for host in (self.phi3, self.hermes):
                try:
                    host.preload()
                except ModelUnavailable as error:
                    log.error("%s", error.detail)

    async def close(self) -> None:
        """Lets running generations end within the grace period, then stops every part."""
        grace = self.settings.shutdown_grace
        for swapping in self._swaps:
            swapping.cancel()
        # Models first: what they still answer is yet to be stored and told.
        await asyncio.gather(self.phi3.close(grace), self.hermes.close(grace))
        # What is still spoken goes out on the bus.
        await self.speaker.close()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self.bus.close()
        await self.archive.close()

    async def generate_phi3(
        self, prompt: str, max_tokens: int
    ) -> tuple[dict[str, Any], Completion]:
        """A proposal alone: not assessed, not stored, not told."""
        proposal, completion = await proposals.propose(
            self.phi3,
            prompt,
            self.archive.examples,
            max_tokens=max_tokens,
            temperature=self.settings.phi3_temperature,
        )
        self._metrics.proposed(proposal["action"])
        return proposal, completion

    async def generate_hermes(self, prompt: str, max_tokens: int) -> Completion:
        """Hermes' answer to a free question."""
        temperature = self.settings.hermes_temperature
        return await hermes_plugin.chat(
            self.hermes, prompt, max_tokens=max_tokens, temperature=temperature
        )

    async def propose(self, prompt: str, max_tokens: int) -> AssessedProposal:
        """A proposal with Hermes' critique and score, stored and told to the other services."""
        transaction_id = uuid.uuid4()
        try:
            result = await self._propose(transaction_id, prompt, max_tokens)
        except SidecarError as error:
            await self._log_run(transaction_id, prompt, error_message=error.detail)
            raise
        return result

    async def _propose(
        self, transaction_id: uuid.UUID, prompt: str, max_tokens: int
    ) -> AssessedProposal:
        began = time.monotonic()
        proposal, completion = await self.generate_phi3(prompt, max_tokens)
        proposed = time.monotonic()
        await self._publish(PROPOSAL_CREATED, {**proposal, "transaction_id": str(transaction_id)})
        assessment = await hermes_plugin.assess(
            self.hermes,
            proposal,
            prompt,
            max_tokens=max_tokens,
            temperature=self.settings.hermes_temperature,
        )
        assessed = time.monotonic()
        score = await self._score(proposal, prompt)
        latencies = Latencies(
            proposal=proposed - began,
            assessment=assessed - proposed,
            score=time.monotonic() - assessed,
        )
        output = {"proposal": proposal, "assessment": assessment.text, "score": score}
        await asyncio.gather(
            self._log_run(transaction_id, prompt, output=output),
            self._keep(
                HermesScoreSchema(
                    run_id=str(transaction_id), score=score, rationale=assessment.text
                )
            ),
            self._keep(
                ProposalSchema(
                    transaction_id=str(transaction_id),
                    prompt=prompt,
                    proposal=proposal,
                    assessment=assessment.text,
                    score=score,
                    model=completion.model,
                    adapter=completion.adapter,
                    latencies=latencies,
                )
            ),
        )
        await self._publish(
            PROPOSAL_ASSESSED,
            {
                "proposal_transaction_id": str(transaction_id),
                "assessment_text": assessment.text,
                "timestamp": _now().isoformat(),
            },
        )
        return AssessedProposal(transaction_id, proposal, completion, assessment, score)

    async def score(
        self, proposal: Mapping[str, Any], context: str | None
    ) -> tuple[uuid.UUID, float]:
        """Scores a proposal and stores the score under the proposal's own id, or a new one."""
        proposal_id = _uuid_or_none(proposal.get("id")) or uuid.uuid4()
        score = await self._score(proposal, context)
        rationale = proposal.get("rationale")
        await self._keep(
            HermesScoreSchema(
                run_id=str(proposal_id),
                score=score,
                rationale=rationale if isinstance(rationale, str) else "",
            )
        )
        return proposal_id, score

    async def _score(self, proposal: Mapping[str, Any], context: str | None) -> float:
        score = await hermes_plugin.score(self.hermes, proposal, context)
        self._metrics.scored(score)
        return score

    async def submit_feedback(self, feedback: Phi3FeedbackSchema) -> bool | None:
        """Stores feedback, then tells the other services.

        Returns:
            Whether it is a few-shot example for the next proposals; None where that is not known
            before the database is back.

        Raises:
            DatabaseUnavailable: it is not stored; the caller still has it.
        """
        # With its id, by which whoever hears of it knows it again.
        feedback_id = feedback.as_row()["feedback_id"]
        stored = feedback.model_dump(mode="json") | {"feedback_id": feedback_id}
        is_example = await self.archive.append_feedback(feedback)
        await self._publish(FEEDBACK_SUBMITTED, stored)
        return is_example

    async def swap_adapter(self, name: str | None = None) -> datetime.date | None:
        """Takes an adapter of Phi-3's into use, and remembers it for the next start.

        Args:
            name: `YYYYMMDD` or `YYYYMMDD-dpo`; the newest where none is named, and none where
                there is none.

        Returns:
            The date of the adapter in use.

        Raises:
            AdapterRejected: it cannot be loaded, and the one in use goes on.
            ModelUnavailable: Phi-3 is missing or does not load.
        """
        folder = self.settings.adapter_dir
        chosen = (
            loader.get_latest_adapter_dir(folder)
            if name is None
            else loader.find_adapter_dir(folder, name)
        )
        # To its end, also where whoever asked for it has gone.
        swapping = asyncio.create_task(self._swap_adapter(chosen))
        self._swaps.add(swapping)
        swapping.add_done_callback(self._swaps.discard)
        await asyncio.shield(swapping)
        return self.adapter_date()

    async def _swap_adapter(self, chosen: Path | None) -> None:
        async with self._swapping:
            if chosen != self.phi3.adapter:
                try:
                    await self.phi3.swap_adapter(chosen)
                finally:
                    # A worker that is to take an adapter gives up what it prepares.
                    self._prepare_examples()
            await asyncio.to_thread(self._remembered.save, chosen)

    def adapter_date(self) -> datetime.date | None:
        """The date of Phi-3's adapter in use."""
        adapter = self.phi3.adapter
        return None if adapter is None else loader.adapter_date(adapter)

    def missing(self) -> list[str]:
        """The parts without which requests fail; the event bus is none of them."""
        available = {
            "phi3": self.phi3.available(),
            "hermes": self.hermes.available(),
            "database": self.archive.available(),
        }
        return [name for name, is_there in available.items() if not is_there]

    def health(self) -> dict[str, Any]:
        """The state of the whole and of each part: JSON types only."""
        models = {"phi3": self.phi3.status(), "hermes": self.hermes.status()}
        bus = self.bus.status()
        missing = self.missing()
        date = self.adapter_date()
        status = "ok"
        whole = bus["connected"] and self.speaker.available() and self.archive.is_whole()
        if missing or not whole:
            status = "error" if {"phi3", "hermes"} <= set(missing) else "partial_error"
        return {
            "status": status,
            "hermes_loaded": models["hermes"]["state"] == "ready",
            "phi3_loaded": models["phi3"]["state"] == "ready",
            "phi3_model_file_exists": loader.phi3_model_file_exists(self.settings),
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
        """Keeps what any service publishes; our own is in the table already and stays one row."""
        try:
            feedback = Phi3FeedbackSchema.model_validate_json(payload)
        except ValueError as error:
            # The type only: the message quotes what people wrote.
            log.error("feedback on the event bus is not valid: %s", type(error).__name__)
            return
        if feedback.feedback_id is None and not json.loads(payload).get("timestamp"):
            # Each sidecar that hears it gives it a time of its own, and all of them the same id.
            feedback_id = hashlib.sha256(payload.encode()).hexdigest()
            feedback = feedback.model_copy(update={"feedback_id": feedback_id})
        said = False
        while True:
            try:
                await self.archive.append_feedback(feedback)
            except DatabaseUnavailable as error:
                # Nobody would send it again, so it waits, and what comes after it in the queue.
                if not said:
                    log.error("feedback of another service waits: %s", error.detail)
                said = True
                await asyncio.sleep(_STORE_AGAIN)
            else:
                return

    async def _log_run(
        self,
        transaction_id: uuid.UUID,
        prompt: str,
        *,
        output: Mapping[str, Any] | None = None,
        error_message: str | None = None,
    ) -> None:
        run = OrchestratorRunSchema(
            run_id=str(transaction_id),
            input_query=prompt,
            final_output="" if output is None else json.dumps(output),
            status="error" if output is None else "success",
            error_message=error_message,
        )
        await self._keep(run)

    async def _keep(self, row: OrchestratorRunSchema | HermesScoreSchema | ProposalSchema) -> None:
        """A trader's answer does not hang on a full disk: that goes to the log."""
        try:
            await self.archive.append(row)
        except DatabaseUnavailable as error:
            log.error("a row is not stored: %s", error.detail)

    async def _publish(self, channel: str, payload: Mapping[str, Any]) -> None:
        await self.bus.publish(channel, json.dumps(payload))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _uuid_or_none(value: object) -> uuid.UUID | None:
    try:
        return uuid.UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None

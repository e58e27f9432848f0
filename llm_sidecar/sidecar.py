"""The composition root: builds the components from the settings, starts and stops them in order."""

from __future__ import annotations

import asyncio
import logging

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db import Store
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.redis_url import MEMORY, make_client
from llm_sidecar.logs import start_detached
from llm_sidecar.models import files
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Models
from llm_sidecar.models.registry import MakeModels, create_models
from llm_sidecar.services import few_shot
from llm_sidecar.services.adapters import Adapters
from llm_sidecar.services.chat import Chat
from llm_sidecar.services.conversation import Conversations
from llm_sidecar.services.decisions import Decisions
from llm_sidecar.services.event_feed import EventFeed
from llm_sidecar.services.feedback import Feedback
from llm_sidecar.services.few_shot import FewShotExamples
from llm_sidecar.services.health import Health
from llm_sidecar.services.idempotency import Idempotency
from llm_sidecar.services.propose import Orchestrator, Proposer
from llm_sidecar.services.rows import Rows
from llm_sidecar.services.score import Judge, JudgeOptions
from llm_sidecar.services.served_models import ServedModels
from llm_sidecar.settings import Settings
from llm_sidecar.tasks import TaskSet
from llm_sidecar.telemetry.base import Instrument
from llm_sidecar.telemetry.calls import Observers
from llm_sidecar.telemetry.metrics import MetricsSink
from llm_sidecar.tts.choice import choose
from llm_sidecar.tts.listeners import AudioListeners
from llm_sidecar.tts.piper import PiperVoice
from llm_sidecar.tts.remote import RemoteVoice
from llm_sidecar.tts.speaker import Speaker

log = logging.getLogger(__name__)


class Sidecar:
    """The components of one sidecar.

    Attributes:
        settings: of all components.
        models: phi3 and hermes.
        chat, conversations, served_models, decisions, proposer, judge, orchestrator, feedback,
            few_shot, adapters, idempotency, health: the services.
        speaker, listeners: the voice, and the listeners of its stream.
        event_feed, dead_letters: the listeners of the events, and the dead letters of the inbox.
    """

    def __init__(
        self,
        settings: Settings,
        models: Models | MakeModels | None = None,
        metrics: MetricsSink | None = None,
        telemetry: Instrument | None = None,
    ) -> None:
        """Builds the components; opens, connects and loads nothing.

        Args:
            settings: of all components.
            models: phi3 and hermes, or what builds them; default: those that the settings specify.
            metrics: receives calls, proposals and scores.
            telemetry: receives calls and failures of models; the caller starts and stops it.
        """
        self.settings = settings
        metrics, telemetry = metrics or MetricsSink(), telemetry or Instrument()
        observers = Observers(metrics, telemetry)
        if not isinstance(models, Models):
            make_models = models or create_models
            models = make_models(
                settings, observers, telemetry.worker_died, lambda: self.health.log_forecast()
            )
        self.models = models
        self._store = Store(settings.database.uri, log_dir=settings.database.log_dir)
        self._bus = EventBus(
            settings.events.url.get_secret_value(),
            stream=settings.events.stream,
            stream_maxlen=settings.events.stream_maxlen,
            outbox=self._store.outbox,
        )
        self._store.share(
            on_feedback=lambda: self._bus.watcher.touch_soon(few_shot.FACT),
            compacting=lambda: self._bus.leases.held("compaction"),
            opening=lambda: self._bus.leases.held("tables", wait=True),
        )
        self._tasks = TaskSet()
        self._connecting: asyncio.Task[None] | None = None
        self._build_speech(settings)
        self._build_memory(settings, metrics)
        self.event_feed = EventFeed(self._bus.events, settings.events.max_listeners)
        self.dead_letters = self._bus.dead_letters
        self._build_services(settings, metrics)

    def _build_speech(self, settings: Settings) -> None:
        self._remote_voice = _remote_voice(settings)
        self._piper = PiperVoice()
        self.speaker = Speaker(
            self._bus,
            choose(settings.speech.voice, remote=self._remote_voice, piper=self._piper),
            queue_length=settings.speech.queue_length,
            timeout=settings.speech.timeout,
        )
        self.listeners = AudioListeners(self._bus, settings.speech.max_listeners)

    def _build_memory(self, settings: Settings, metrics: MetricsSink) -> None:
        self._rows = Rows(self._store, self._bus, metrics)
        self.idempotency = Idempotency(
            self._store,
            self._bus.requests,
            self._tasks,
            metrics,
            timeout=settings.limits.request_timeout,
        )
        self.few_shot = FewShotExamples(
            self._store,
            self._bus,
            count=files.few_shot_examples(settings),
            from_bus=settings.proposals.examples_from_bus,
            context_length=lambda: files.phi3_context_length(settings),
            on_change=self._prefill_examples,
        )
        self.feedback = Feedback(
            self._store,
            self._bus,
            self.few_shot,
            max_chars=settings.limits.max_prompt_chars,
            examples_from_bus=settings.proposals.examples_from_bus,
        )
        self.adapters = Adapters(
            self.models.phi3,
            settings.models.adapter_dir,
            AdapterState(self._store.log_folder, settings.models.adapter_dir),
            self._rows,
            self._tasks,
            self._bus,
        )

    def _build_services(self, settings: Settings, metrics: MetricsSink) -> None:
        self.proposer = Proposer(
            self.models.phi3,
            lambda: self.few_shot.examples,
            metrics,
            temperature=settings.models.phi3_temperature,
            retry=settings.proposals.grounding == "retry",
        )
        self.served_models = ServedModels(self.models, settings.models.adapter_dir)
        self.conversations = Conversations(self.served_models, self.proposer, settings)
        self._prompts = hermes_plugin.prompts_for(settings)
        temperature = settings.models.hermes_temperature
        self.chat = Chat(self.models.hermes, temperature, self._prompts)
        options = JudgeOptions(
            temperature,
            settings.models.critique_max_tokens,
            settings.models.min_answer_mass,
            self._prompts,
        )
        self.decisions = Decisions(self.served_models, settings.models.min_answer_mass)
        self.judge = Judge(self.models.hermes, self._rows, metrics, options)
        self.orchestrator = Orchestrator(self.proposer, self.judge, self._rows)
        self.health = Health(
            settings,
            models=self.models,
            adapters=self.adapters,
            bus=self._bus,
            store=self._store,
            rows=self._rows,
            speaker=self.speaker,
            remote_voice=self._remote_voice,
            listeners=self.listeners,
            event_feed=self.event_feed,
        )

    async def start(self) -> None:
        """Starts the components; an unavailable one does not stop the others from starting."""
        if self.settings.models.demo:
            log.warning("SIDECAR_DEMO is on: a demo model answers where no model is configured")
        self._store.start()
        self.few_shot.start()
        self._rows.start()
        await self.feedback.subscribe()
        if self._remote_voice is not None:
            await self._remote_voice.start()
        # In the background, because the first attempt takes seconds if Redis is unavailable.
        self._connecting = start_detached(self._bus.start())
        if self.settings.models.preload and self.settings.speech.voice in ("auto", "piper"):
            self._loading_voice = start_detached(self._piper.preload())
        await self._prefill_phi3()
        await self.models.hermes.prefill(hermes_plugin.prefix(self._prompts.system))
        await self.models.phi3.start(await self.adapters.at_start())
        await self.models.hermes.start()
        self.adapters.start()

    def drain(self) -> None:
        """Refuses requests that wait for a model to load, and ends the streams of events."""
        for model in self.models:
            model.drain()
        self.event_feed.drain()

    async def close(self) -> None:
        """Gives running generations the grace period to finish, then stops every component."""
        grace = self.settings.limits.shutdown_grace
        await self.adapters.close()
        # Models first: the results of running requests are still stored.
        await asyncio.gather(*(model.close(grace) for model in self.models))
        await self._tasks.join()
        # Before it closes, the bus carries the last speech and sends the events of the journal.
        await self.speaker.close()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self._bus.close()
        await self.few_shot.close()
        await self._rows.close()
        # Last, because everything above may still write to the journal.
        await self._store.close()

    def _prefill_examples(self) -> None:
        # Replaces a running prefill of older examples.
        self._prefilling = start_detached(self._prefill_phi3())

    async def _prefill_phi3(self) -> None:
        temperature = self.settings.models.phi3_temperature
        await self.models.phi3.prefill(proposals.prefix(self.few_shot.examples, temperature))


def _remote_voice(settings: Settings) -> RemoteVoice | None:
    """The voice of speech workers, if it is wanted and a worker could be on the same Redis."""
    url = settings.events.url.get_secret_value()
    if settings.speech.voice not in ("auto", "chatterbox") or url.startswith(MEMORY):
        return None
    # Leaves time for the embedded voice if no part arrives.
    return RemoteVoice(make_client(url), part_timeout=settings.speech.timeout / 2)

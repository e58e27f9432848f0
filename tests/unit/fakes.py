"""Fakes at the seams: the database, the event bus, metrics; and a module's fresh copy.

The fake of a model is `llm_sidecar.models.fake.FakeModel`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib.util
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from redis.exceptions import NoPermissionError

from llm_sidecar import hermes_plugin
from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.db import Correction, Store
from llm_sidecar.db.transaction import Claim, Progress, RequestKey, Transaction
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DatabaseUnavailable, RequestKeyReused
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.facts import ABSENT, Fact
from llm_sidecar.event_bus.leases import Lease
from llm_sidecar.event_bus.request_records import Record, SharedClaim
from llm_sidecar.models.base import ChoiceScores, Completion, Delta, GenerationRequest, Models
from llm_sidecar.models.fake import IDENTITY, FakeModel
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.telemetry.metrics import MetricsSink

T = TypeVar("T")


def completion(text: str, **changes: object) -> Completion:
    """A finished generation by `phi3/fake`, unless the changes say otherwise."""
    values: dict[str, object] = {
        "model": "phi3/fake",
        "adapter": None,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 9,
        "identity": IDENTITY,
    }
    return Completion(text=text, **(values | changes))  # type: ignore[arg-type]


def scores(**found: float) -> ChoiceScores:
    """Of Hermes' eleven answers: `_7=0.5` is that of 7, and those without a name have none."""
    none = dict.fromkeys(hermes_plugin.SCORE_ANSWERS, 0.0)
    return ChoiceScores(none | {name[1:]: value for name, value in found.items()})


async def last_of(items: AsyncGenerator[Any, None], kind: type[T]) -> T:
    """The last item of a stream; `kind` is its type."""
    *_, last = [item async for item in items]
    assert isinstance(last, kind)
    return last


async def text_of(stream: AsyncGenerator[Delta, None]) -> Completion:
    """The completion that the deltas of a generation form."""
    return Completion.of([delta async for delta in stream])


async def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


class PausedModel(FakeModel):
    """Generates one delta, and the next only once `resumed` is set.

    Attributes:
        resumed: lets the generation end with its second delta.
        closed: how many streams have ended in any way.
    """

    def __init__(self, first: str = "{", rest: str = "}") -> None:
        super().__init__()
        self.resumed = asyncio.Event()
        self.closed = 0
        self._first, self._rest = first, rest

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        try:
            yield Delta(self._first, "paused/fake")
            await self.resumed.wait()
            yield Delta(self._rest, "paused/fake", completion_tokens=2, finish_reason="stop")
        finally:
            self.closed += 1


class Happened:
    """Everything that a sidecar stores, publishes and counts, in order.

    Attributes:
        log: (`row` or `draft`, the name of its class, its columns), (`event`, its channel, its
            payload), (`refusal`, a channel, the reason) and (`metric`, its name, its value).
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []

    def of(self, kind: str) -> list[tuple[str, Any]]:
        """The names and contents of one kind, in order."""
        return [(name, content) for happened, name, content in self.log if happened == kind]


class FakeFacts:
    """Facts and leases in memory, which several sidecars can share.

    Attributes:
        facts: by name.
        leases: the names of the leases that are held, in order.
        events: those of replacements.
        denies_events: whether Redis denies them.
        failure: raised instead of an answer.
        before_replace: is called before each replacement.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Fact] = {}
        self.leases: list[str] = []
        self.failure: Exception | None = None
        self.events: list[CloudEvent] = []
        self.denies_events = False
        self.before_replace: Callable[[], None] = lambda: None
        self._watching: list[tuple[str, Callable[[Fact], None]]] = []

    async def get(self, name: str) -> Fact:
        if self.failure is not None:
            raise self.failure
        return self.facts.get(name, ABSENT)

    async def replace(
        self, name: str, version: int, value: Any, event: CloudEvent | None = None
    ) -> bool:
        self.before_replace()
        if (await self.get(name)).version != version:
            return False
        if event is not None and self.denies_events:
            raise NoPermissionError("NOPERM")
        self.set(name, Fact(version + 1, value))
        self.events += [] if event is None else [event]
        return True

    def set(self, name: str, fact: Fact) -> None:
        """Sets a fact, as another sidecar does."""
        self.facts[name] = fact
        for watched, on_change in self._watching:
            if watched == name:
                on_change(fact)

    def watch(self, name: str, on_change: Callable[[Fact], None]) -> None:
        self._watching.append((name, on_change))

    @contextlib.asynccontextmanager
    async def held(self, name: str, *, wait: bool = False) -> AsyncIterator[bool]:
        self.leases.append(name)
        yield True


class FakeLease:
    """The lock of a request."""

    def __init__(self, held: set[str], key: str) -> None:
        self._held, self._key = held, key

    async def release(self) -> None:
        self._held.discard(self._key)


class FakeRecords:
    """The requests that several machines share.

    Attributes:
        records: by key.
        locked: the keys of requests that a machine answers.
        away: whether Redis is.
    """

    def __init__(self, *, away: bool = False) -> None:
        self.records: dict[str, Record] = {}
        self.locked: set[str] = set()
        self.away = away

    async def claim(self, caller: str, key: str, first: Record, owner: str) -> Any:
        if self.away:
            return None
        record = self.records.setdefault(key, first)
        free = record.response is None and record.fingerprint == first.fingerprint
        if not free or key in self.locked:
            return SharedClaim(record, None)
        self.locked.add(key)
        return SharedClaim(record, cast(Lease, FakeLease(self.locked, key)))

    async def save(self, caller: str, key: str, record: Record) -> None:
        if (before := self.records.get(key)) is not None and before.response is not None:
            return
        self.records[key] = record
        if record.state is None and record.response is None:
            del self.records[key]


class FakeBus:
    """An event bus that accepts every event.

    Attributes:
        facts, watcher, leases: the same fake.
        requests: none is shared.
        subscribers: by channel; that of the inbox by the name of its stream.
        connected: whether Redis can be reached.
    """

    def __init__(self, happened: Happened | None = None, facts: FakeFacts | None = None) -> None:
        self._happened = happened or Happened()
        self.facts = self.watcher = self.leases = facts or FakeFacts()
        self.requests = FakeRecords(away=True)
        self.subscribers: dict[str, Any] = {}
        self.connected = True

    def status(self) -> dict[str, Any]:
        return {"state": "fake"}

    async def publish(self, channel: str, payload: str) -> bool:
        self._happened.log.append(("event", channel, json.loads(payload)))
        return True

    def send(self, event: CloudEvent) -> None:
        self._happened.log.append(("event", event.type, json.loads(event.data)))

    async def subscribe_batches(self, channel: str, receive: Any) -> None:
        self.subscribers[channel] = receive

    async def read_inbox(self, receive: Any) -> None:
        self.subscribers["osiris.inbox"] = receive

    def refuse(self, channel: str, reason: str) -> None:
        self._happened.log.append(("refusal", channel, reason))

    @property
    def bus(self) -> EventBus:
        """Itself, with the type that services expect."""
        return cast(EventBus, self)


class FakeStore:
    """A database in memory, which returns what a test prepares.

    Attributes:
        rows: the rows that are stored.
        commits: the transactions that are durable.
        requests: the progress of each request with a key.
        fingerprints: of each request with a key that is claimed or has progress.
        claimed: the requests that run.
        released: the requests that were released.
        corrections: newest first.
        prompts: the prompts of the runs, by transaction_id.
        withdrawn: the ids of withdrawn feedback.
        transactions: the transaction_ids of stored feedback, by feedback_id.
        mean: of the scores, and their number.
        since: the start times of the reads of scores.
        timeouts: the seconds of each wait until it is open.
        queries: the options of each query for corrections.
        failure: raised by every read.
        full: raised instead of storing a row.
        readable: until it is set, queries for corrections wait.
        is_away: whether it is not open.
        database_id: the database's own id, once that is known; until then that of the journal
            stands for it.
    """

    def __init__(self, happened: Happened | None = None) -> None:
        self._happened = happened or Happened()
        self.rows: list[Any] = []
        self.commits: list[Transaction] = []
        self.requests: dict[RequestKey, Progress] = {}
        self.fingerprints: dict[RequestKey, str] = {}
        self.claimed: set[RequestKey] = set()
        self.released: list[RequestKey] = []
        self.corrections: list[Correction] = []
        self.prompts: dict[str, str] = {}
        self.withdrawn: set[str] = set()
        self.transactions: dict[str, str] = {}
        self.mean: tuple[float | None, int] = (None, 0)
        self.since: list[datetime.datetime] = []
        self.timeouts: list[float] = []
        self.queries: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.full: DatabaseUnavailable | None = None
        self.readable = asyncio.Event()
        self.readable.set()
        self.is_away = False
        self.log_folder = Path("/log")
        self.database_id: str | None = None

    async def id(self) -> str:
        return self.database_id or "journal"

    @property
    def journal_id(self) -> str:
        return "journal"

    def has_id(self, name: str) -> bool:
        return name in (self.database_id, "journal")

    @property
    def store(self) -> Store:
        """Itself, with the type that services expect."""
        return cast(Store, self)

    async def opened(self, timeout: float) -> None:
        self.timeouts.append(timeout)
        self._fail()

    def is_open(self) -> bool:
        return not self.is_away

    def refusal(self) -> str | None:
        return None if self.full is None else self.full.detail

    def status(self) -> dict[str, Any]:
        return {"state": "fake"}

    async def commit(self, transaction: Transaction) -> None:
        if self.full is not None:
            raise self.full
        self.commits.append(transaction)
        kind = "row" if transaction.draft is None else "draft"
        for row in transaction.rows:
            self.rows.append(row)
            self._happened.log.append((kind, type(row).__name__, row.as_row()))
        for event in transaction.events:
            self._happened.log.append(("event", event.type, json.loads(event.data)))
        if (progress := transaction.progress) is not None:
            assert progress.request in self.claimed
            before = self.requests.get(progress.request, progress)
            self.requests[progress.request] = Progress(
                progress.request,
                progress.state or before.state,
                progress.response or before.response,
            )
            if progress.response is not None:
                self.claimed.remove(progress.request)

    async def claim(self, request: RequestKey, fingerprint: str) -> Claim:
        if self.full is not None:
            raise self.full
        while request in self.claimed:
            await asyncio.sleep(0)
        if self.fingerprints.setdefault(request, fingerprint) != fingerprint:
            raise RequestKeyReused("This Idempotency-Key was used for another request.")
        kept = self.requests.get(request, Progress(request))
        if kept.response is None:
            self.claimed.add(request)
        return Claim(kept.state, kept.response)

    async def request_state(self, request: RequestKey) -> str | None:
        return self.requests[request].state if request in self.requests else None

    async def release(self, request: RequestKey) -> None:
        self.released.append(request)
        self.claimed.discard(request)
        if self.full is not None:
            raise self.full
        if request not in self.requests:
            del self.fingerprints[request]

    async def recent_corrections(
        self, count: int, usable: Callable[[Correction], bool], **options: Any
    ) -> list[Correction]:
        self.queries.append({"count": count, **options})
        await self.readable.wait()
        self._fail()
        return [one for one in self.corrections if usable(one)][:count]

    async def prompt(self, run_id: str) -> str | None:
        return self.prompts.get(run_id)

    async def is_withdrawn(self, feedback_id: str) -> bool:
        return feedback_id in self.withdrawn

    async def feedback_transaction(self, feedback_id: str) -> str | None:
        self._fail()
        return self.transactions.get(feedback_id)

    async def mean_score_since(self, since: datetime.datetime) -> tuple[float | None, int]:
        self.since.append(since)
        self._fail()
        return self.mean

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class FakeMetrics(MetricsSink):
    """Records proposals, scores, lost rows and repeated answers."""

    def __init__(self, happened: Happened) -> None:
        self._happened = happened

    def proposed(self, action: str, ungrounded: Sequence[str]) -> None:
        self._happened.log.append(("metric", "proposed", (action, *ungrounded)))

    def scored(self, score: float, answer_mass: float, *, reliable: bool) -> None:
        self._happened.log.append(("metric", "scored", (score, answer_mass, reliable)))

    def row_lost(self, table: str) -> None:
        self._happened.log.append(("metric", "row_lost", table))

    def replayed(self) -> None:
        self._happened.log.append(("metric", "replayed", None))


class FakeSidecar:
    """A sidecar whose models, database and event bus are fakes; its services are the real ones.

    Attributes:
        sidecar: the real one.
        phi3, hermes: its models.
        store: its database.
        bus: its event bus.
        happened: rows, events and metrics, in order.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        phi3: FakeModel | None = None,
        hermes: FakeModel | None = None,
    ) -> None:
        settings = settings or Settings.from_environ({"REDIS_URL": "memory://"})
        self.happened = Happened()
        self.phi3, self.hermes = phi3 or FakeModel(), hermes or FakeModel()
        self.store, self.bus = FakeStore(self.happened), FakeBus(self.happened)
        metrics = FakeMetrics(self.happened)
        self.sidecar = Sidecar(settings, models=Models(self.phi3, self.hermes), metrics=metrics)
        # Builds the services once more, over the fakes.
        self.sidecar._store, self.sidecar._bus = self.store.store, self.bus.bus
        self.sidecar._build_memory(settings, metrics)
        self.sidecar._build_services(settings, metrics)

    def attempt(self) -> Attempt:
        """An attempt at a request without an `Idempotency-Key`."""
        return self.sidecar.idempotency.without_key()


def fresh(module: ModuleType) -> ModuleType:
    """Executes the module again, so that the work of its import runs now.

    The one that everybody imports stays as it is.
    """
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert sys.modules[module.__name__] is module
    return again

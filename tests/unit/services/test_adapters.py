"""Swaps of Phi-3's adapter: the adapter, the calls of the model, the saved name."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from llm_sidecar.errors import AdapterRejected, Unavailable
from llm_sidecar.event_bus.facts import ABSENT, Fact
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.services import adapters as module
from llm_sidecar.services import refresh
from llm_sidecar.services.adapters import Adapters
from llm_sidecar.services.rows import Rows
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeBus, FakeFacts, FakeMetrics, FakeStore, Happened, until


class SwappingModel(FakeModel):
    """Takes an adapter only once `gate` is set; refuses those in `bad`.

    Attributes:
        swaps: the names that it was asked for.
    """

    def __init__(self, *bad: str) -> None:
        super().__init__()
        self.swaps: list[str | None] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._bad = bad

    async def use_adapter(self, adapter: Adapter | None) -> None:
        name = None if adapter is None else adapter.name
        self.swaps.append(name)
        await self.gate.wait()
        if name in self._bad:
            raise AdapterRejected(f"{name} is broken.")
        await super().use_adapter(adapter)


class Made:
    """Adapters of two dates, and a model that takes them.

    Args:
        facts: shared with another sidecar.
    """

    def __init__(self, folder: Path, *bad: str, facts: FakeFacts | None = None) -> None:
        self.facts = facts or FakeFacts()
        self.folder = folder / "adapters"
        for name in ("20260101", "20260102"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name / "adapter_config.json").touch()
        self.phi3 = SwappingModel(*bad)
        self.state = AdapterState(folder, self.folder)
        self.tasks = TaskSet()
        self.happened = Happened()
        self.store = FakeStore(self.happened)
        bus, metrics = FakeBus(self.happened, self.facts), FakeMetrics(self.happened)
        rows = Rows(self.store.store, bus.bus, metrics)
        self.adapters = Adapters(self.phi3, self.folder, self.state, rows, self.tasks, bus.bus)

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Starts the model and follows the others, as the sidecar does."""
        await self.phi3.start(await self.adapters.at_start())
        self.phi3.swaps.clear()
        self.adapters.start()
        try:
            yield
        finally:
            await self.adapters.close()

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The types and payloads of the events that went out with the fact."""
        return [(event.type, json.loads(event.data)) for event in self.facts.events]

    @property
    def used(self) -> str | None:
        """The name of the adapter in use."""
        adapter = self.phi3.status().adapter
        return None if adapter is None else adapter.name

    @property
    def agreed(self) -> str | None:
        """The name of the adapter that the sidecars agree on."""
        name: str | None = self.facts.facts["adapter"].value["adapter"]
        return name

    @property
    def kept(self) -> str | None:
        """The name of the adapter for the next start."""
        adapter = self.state.load()
        return None if adapter is None else adapter.name


async def test_the_newest_adapter_is_used_and_kept_for_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = Made(tmp_path)
    assert made.adapters.date() is None
    assert await made.adapters.swap() == datetime.date(2026, 1, 2)
    assert (made.phi3.swaps, made.kept) == (["20260102"], "20260102")
    assert caplog.messages == ["phi3 changed its adapter from none to 20260102 in 0.0 s"]


async def test_without_adapters_in_the_folder_none_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = Made(tmp_path)
    await made.adapters.swap("20260101")
    shutil.rmtree(made.folder)
    assert await made.adapters.swap() is None
    assert (made.phi3.swaps, made.kept) == (["20260101", None], None)
    assert caplog.messages[1] == "phi3 changed its adapter from 20260101 to none in 0.0 s"


async def test_the_log_line_of_a_swap_has_its_fields(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    made = Made(tmp_path)
    await made.adapters.swap("20260101")
    made.phi3.gate.clear()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    swapping = asyncio.create_task(made.adapters.swap("20260102"))
    await until(lambda: len(made.phi3.swaps) == 2)
    monkeypatch.setattr(time, "monotonic", lambda: 161.26)
    made.phi3.gate.set()
    await swapping
    line = vars(caplog.records[1])
    assert line["model"] == "phi3"
    assert (line["previous_adapter"], line["adapter"]) == ("20260101", "20260102")
    assert line["seconds"] == 61.3


async def test_an_adapter_is_used_by_its_name(tmp_path: Path) -> None:
    made = Made(tmp_path)
    await made.adapters.swap()
    assert await made.adapters.swap("20260101") == datetime.date(2026, 1, 1)
    assert (made.phi3.swaps, made.kept) == (["20260102", "20260101"], "20260101")


async def test_the_adapter_in_use_is_not_loaded_again(tmp_path: Path) -> None:
    made = Made(tmp_path)
    for _ in range(2):
        await made.adapters.swap("20260101")
    assert made.phi3.swaps == ["20260101"]


async def test_each_swap_is_an_event(tmp_path: Path) -> None:
    made = Made(tmp_path)
    for name in ("20260101", "20260101", "20260102"):
        await made.adapters.swap(name)
    shutil.rmtree(made.folder)
    await made.adapters.swap()
    events = made.events
    assert {channel for channel, _ in events} == {"phi3.adapter.swapped"}
    assert [(event["previous"], event["adapter"]) for _, event in events] == [
        (None, "20260101"),
        ("20260101", "20260102"),
        ("20260102", None),
    ]
    assert all(event["timestamp"].endswith("+00:00") for _, event in events)
    assert (made.store.commits, made.happened.of("event")) == ([], [])


async def test_an_event_that_redis_denies_goes_through_the_journal(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.facts.denies_events = True
    for name in ("20260101", "20260101", "20260102"):
        await made.adapters.swap(name)
    assert made.agreed == "20260102"
    assert made.events == []
    assert [(event["previous"], event["adapter"]) for _, event in made.happened.of("event")] == [
        (None, "20260101"),
        ("20260101", "20260102"),
    ]
    assert [len(transaction.events) for transaction in made.store.commits] == [1, 1]


async def test_a_rejected_adapter_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made(tmp_path, "20260102")
    await made.adapters.swap("20260101")
    caplog.clear()
    with pytest.raises(AdapterRejected, match=r"^20260102 is broken\.$"):
        await made.adapters.swap()
    assert (made.kept, made.adapters.date()) == ("20260101", datetime.date(2026, 1, 1))
    assert len(made.events) == 1
    assert caplog.messages == ["phi3 keeps its adapter: 20260102 is broken."]


async def test_a_retry_while_a_bad_adapter_loads_gets_its_refusal(tmp_path: Path) -> None:
    made = Made(tmp_path, "20260102")
    made.phi3.gate.clear()
    first = asyncio.create_task(made.adapters.swap())
    await until(lambda: made.phi3.swaps)
    again = asyncio.create_task(made.adapters.swap())
    await asyncio.sleep(0)
    made.phi3.gate.set()
    for swap in (first, again):
        with pytest.raises(AdapterRejected, match=r"^20260102 is broken\.$"):
            await swap
    assert made.phi3.swaps == ["20260102"]
    # Later it is tried once more.
    with pytest.raises(AdapterRejected):
        await made.adapters.swap()
    assert made.phi3.swaps == ["20260102"] * 2


async def test_a_swap_goes_on_after_its_client_disconnects(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.phi3.gate.clear()
    swap = asyncio.create_task(made.adapters.swap())
    await until(lambda: made.phi3.swaps)
    swap.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swap
    made.phi3.gate.set()
    await made.tasks.join()
    assert (made.kept, made.adapters.date()) == ("20260102", datetime.date(2026, 1, 2))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars follow without a pause."""
    monkeypatch.setattr(refresh, "_PAUSE", 0.0)


@pytest.mark.usefixtures("at_once")
async def test_another_sidecar_follows_a_swap(tmp_path: Path) -> None:
    facts = FakeFacts()
    one = Made(tmp_path / "1", facts=facts)
    other = Made(tmp_path / "2", facts=facts)
    async with one.started(), other.started():
        await one.adapters.swap("20260101")
        await until(lambda: other.kept == "20260101")
        await other.adapters.swap()
        await until(lambda: one.kept == "20260102")
        assert (one.phi3.swaps, other.phi3.swaps) == (["20260101", "20260102"],) * 2
    # Each swap is published once, by the sidecar that made it.
    assert [(e["previous"], e["adapter"]) for _, e in one.events] == [
        (None, "20260101"),
        ("20260101", "20260102"),
    ]
    # Each follower waited for its turn.
    assert facts.leases == ["adapter", "adapter"]


@pytest.mark.usefixtures("at_once")
async def test_a_later_sidecar_starts_with_the_adapter_of_the_others(tmp_path: Path) -> None:
    facts = FakeFacts()
    one = Made(tmp_path / "1", facts=facts)
    await one.adapters.swap("20260101")
    later = Made(tmp_path / "2", facts=facts)
    # What it used when it ran last.
    later.state.save(Adapter(later.folder / "20260102"))
    async with later.started():
        assert (later.used, later.phi3.swaps) == ("20260101", [])


@pytest.mark.usefixtures("at_once")
async def test_the_first_sidecar_of_a_redis_says_what_it_uses(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.state.save(Adapter(made.folder / "20260101"))
    async with made.started():
        await until(lambda: made.facts.facts)
        assert (made.used, made.agreed) == ("20260101", "20260101")
        # Redis has lost its data.
        made.facts.set("adapter", Fact(0, None))
        await until(lambda: made.facts.facts["adapter"].version == 1)
        assert made.agreed == "20260101"
    assert (made.phi3.swaps, made.events) == ([], [])


@pytest.mark.parametrize(
    "value", [None, "20260102", {}, {"adapter": 7}, {"adapter": "../20260102"}]
)
@pytest.mark.usefixtures("at_once")
async def test_a_fact_that_names_no_adapter_is_replaced(tmp_path: Path, value: object) -> None:
    made = Made(tmp_path)
    made.state.save(Adapter(made.folder / "20260101"))
    made.facts.set("adapter", Fact(7, value))
    async with made.started():
        await until(lambda: made.facts.facts["adapter"].version == 8)
    assert (made.used, made.agreed) == ("20260101", "20260101")


async def test_without_redis_a_sidecar_starts_with_its_last_adapter_and_refuses_swaps(
    tmp_path: Path,
) -> None:
    made = Made(tmp_path)
    made.state.save(Adapter(made.folder / "20260101"))
    made.facts.failure = RedisConnectionError("refused")
    async with made.started():
        assert made.used == "20260101"
        with pytest.raises(Unavailable) as caught:
            await made.adapters.swap("20260102")
    assert caught.value.detail == "Redis is away or cannot serve the adapter in use; try again."
    assert caught.value.retry_after == 5
    assert (made.used, made.kept, made.phi3.swaps) == ("20260101", "20260101", [])


async def test_a_sidecar_goes_back_if_redis_fails_during_a_swap(tmp_path: Path) -> None:
    made = Made(tmp_path)
    await made.adapters.swap("20260101")

    def fail() -> None:
        made.facts.failure = RedisConnectionError("refused")

    made.facts.before_replace = fail
    with pytest.raises(Unavailable):
        await made.adapters.swap("20260102")
    assert made.phi3.swaps == ["20260101", "20260102", "20260101"]
    assert (made.used, made.kept, made.agreed) == ("20260101",) * 3
    assert len(made.events) == 1


async def test_of_two_swaps_at_once_the_later_one_holds(tmp_path: Path) -> None:
    made = Made(tmp_path)

    def be_faster() -> None:
        made.facts.before_replace = lambda: None
        made.facts.set("adapter", Fact(1, {"adapter": "20260102"}))

    made.facts.before_replace = be_faster
    await made.adapters.swap("20260101")
    assert (made.used, made.agreed) == ("20260101", "20260101")
    ((_, event),) = made.events
    assert (event["previous"], event["adapter"]) == ("20260102", "20260101")


@pytest.mark.usefixtures("at_once")
async def test_a_sidecar_without_the_adapter_keeps_its_own_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refresh, "REFRESH_SECONDS", 0.0)
    facts = FakeFacts()
    one, other = Made(tmp_path / "1", facts=facts), Made(tmp_path / "2", facts=facts)
    await other.adapters.swap("20260101")
    shutil.move(other.folder / "20260102", tmp_path / "elsewhere")
    async with other.started():
        await one.adapters.swap("20260102")
        await until(lambda: other.adapters.problem)
        assert other.adapters.problem == (
            "PHI3_ADAPTER_DIR does not hold the adapter 20260102, which the other sidecars use."
        )
        assert (other.used, other.kept) == ("20260101", "20260101")
        # It tries again from time to time, and logs that once.
        await until(lambda: len(facts.leases) >= 3)
        errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert errors == [f"phi3 keeps its adapter: {other.adapters.problem}"]
        shutil.move(tmp_path / "elsewhere", other.folder / "20260102")
        await until(lambda: other.used == "20260102")
        await until(lambda: other.adapters.problem is None)


@pytest.mark.usefixtures("at_once")
async def test_a_swap_that_cannot_be_followed_at_once_is_followed_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.0)
    made = Made(tmp_path)
    asked: list[int] = []

    async def fail_twice(name: str) -> Fact:
        asked.append(0)
        if len(asked) in (2, 3):
            raise RedisConnectionError("refused")
        return made.facts.facts.get(name, ABSENT)

    monkeypatch.setattr(made.facts, "get", fail_twice)
    async with made.started():
        made.facts.set("adapter", Fact(7, {"adapter": "20260101"}))
        await until(lambda: made.used == "20260101")
    assert made.adapters.problem is None


@pytest.mark.usefixtures("at_once")
async def test_a_sidecar_without_the_adapter_starts_with_its_last_one(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.state.save(Adapter(made.folder / "20260101"))
    made.facts.set("adapter", Fact(3, {"adapter": "20251231"}))
    async with made.started():
        await until(lambda: made.adapters.problem)
        assert made.used == "20260101"
        # A swap that succeeds solves it for all.
        await made.adapters.swap("20260102")
        assert made.adapters.problem is None
        assert made.agreed == "20260102"

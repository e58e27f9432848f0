"""Swaps of Phi-3's adapter: the adapter, the calls of the model, the saved name."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import time
from pathlib import Path

import pytest

from llm_sidecar.errors import AdapterRejected, DatabaseUnavailable
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.services.adapters import Adapters
from llm_sidecar.services.rows import Rows
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeBus, FakeMetrics, FakeStore, Happened, until


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
    """Adapters of two dates, and a model that takes them."""

    def __init__(self, folder: Path, *bad: str) -> None:
        self.folder = folder / "adapters"
        for name in ("20260101", "20260102"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name / "adapter_config.json").touch()
        self.phi3 = SwappingModel(*bad)
        self.state = AdapterState(folder, self.folder)
        self.tasks = TaskSet()
        self.happened = Happened()
        self.store = FakeStore(self.happened)
        bus, metrics = FakeBus(self.happened), FakeMetrics(self.happened)
        rows = Rows(self.store.store, bus.bus, metrics)
        self.adapters = Adapters(self.phi3, self.folder, self.state, rows, self.tasks)

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
    events = made.happened.of("event")
    assert {channel for channel, _ in events} == {"phi3.adapter.swapped"}
    assert [(event["previous"], event["adapter"]) for _, event in events] == [
        (None, "20260101"),
        ("20260101", "20260102"),
        ("20260102", None),
    ]
    assert all(event["timestamp"].endswith("+00:00") for _, event in events)
    assert [len(transaction.events) for transaction in made.store.commits] == [1, 1, 1]


async def test_a_swap_whose_event_is_not_durable_is_published_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made(tmp_path)
    made.store.full = DatabaseUnavailable("The disk is full.")
    assert await made.adapters.swap("20260101") == datetime.date(2026, 1, 1)
    assert [channel for channel, _ in made.happened.of("event")] == ["phi3.adapter.swapped"]
    assert caplog.messages == ["phi3.adapter.swapped is not durable: The disk is full."]


async def test_a_rejected_adapter_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made(tmp_path, "20260102")
    await made.adapters.swap("20260101")
    caplog.clear()
    with pytest.raises(AdapterRejected, match=r"^20260102 is broken\.$"):
        await made.adapters.swap()
    assert (made.kept, made.adapters.date()) == ("20260101", datetime.date(2026, 1, 1))
    assert len(made.happened.of("event")) == 1
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

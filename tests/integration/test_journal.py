"""The journal: transactions, drafts, the outbox and requests, of one process and of several."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.errors import DatabaseUnavailable, RequestKeyReused
from llm_sidecar.journal import events, requests, rows, totals, writer
from llm_sidecar.journal.clock import Clock
from llm_sidecar.journal.file import NAME
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.requests import Claim, Progress, RequestKey
from llm_sidecar.journal.rows import Entry

ROOT = Path(__file__).resolve().parents[2]
KEY = RequestKey("desk", "key-1")


def row(key: str, data: bytes = b"{}", target: str = "scores") -> Entry:
    return Entry(target, key, data)


def event(name: str) -> CloudEvent:
    return CloudEvent("phi3.proposal.created", "{}", "/osiris", "schema", id=name)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Journal]:
    notes: list[str] = []
    journal = Journal(folder, folder / "set_aside", notes.append)
    journal.start()
    try:
        yield journal
    finally:
        await journal.close()


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with opened(tmp_path) as made:
        yield made


async def keys(journal: Journal) -> list[str]:
    """The keys of the rows that can be moved now."""
    until = await journal.last_movable()
    taken = None if until is None else await journal.take(until, 1000)
    return [] if taken is None else [entry.key for entry in taken[1].entries]


async def sent(journal: Journal) -> list[str]:
    return [queued.event.id for queued in await journal.outbox.head(1000)]


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


# Transactions


async def test_rows_and_events_stay_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        written = event("e")
        await journal.commit([row("a", b'{"n":1}')], [written])
        assert journal.rows_written == 1
    async with opened(tmp_path) as journal:
        until = await journal.last_movable()
        assert until is not None
        taken = await journal.take(until, 9)
        assert taken is not None
        assert taken[1].entries == [Entry("scores", "a", b'{"n":1}', again=False)]
        assert [queued.event for queued in await journal.outbox.head(9)] == [written]


async def test_the_first_row_with_a_key_stays(journal: Journal) -> None:
    await journal.commit([row("a", b"first"), row("a", b"second", target="runs")])
    await journal.commit([row("a", b"third"), row("b")])
    assert await journal.find("scores", ["a"]) == b"first"
    assert await journal.find("runs", ["x", "a"]) == b"second"
    assert await keys(journal) == ["a", "a", "b"]


async def test_a_transaction_that_fails_leaves_nothing(journal: Journal) -> None:
    unclaimed = Progress(RequestKey("", "never claimed"))
    with pytest.raises(KeyError):
        await journal.commit([row("a")], [event("a")], unclaimed)
    await journal.commit([row("b")], [event("b")])
    assert await keys(journal) == ["b"]
    assert await sent(journal) == ["b"]
    assert journal.status()["rows"] == 1


async def test_concurrent_transactions_are_committed_in_groups(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.commit()
    commits = []
    attempt = writer.JournalWriter._attempt

    def counted(self: writer.JournalWriter, group: Any, chores: Any) -> bool:
        commits.append(len(group))
        return attempt(self, group, chores)

    monkeypatch.setattr(writer.JournalWriter, "_attempt", counted)
    await asyncio.gather(*(journal.commit([row(str(number))]) for number in range(200)))
    assert sum(commits) == 200
    assert len(commits) < 50
    assert len(await keys(journal)) == 200


async def test_a_full_journal_refuses_rows_until_some_are_moved(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 100)
    await journal.commit([row("a", b"x" * 100)])
    assert journal.refusal() == rows.FULL
    with pytest.raises(DatabaseUnavailable, match="The journal is full until") as caught:
        await journal.commit([row("b", b"x")], [event("b")])
    assert caught.value.retry_after == 30
    assert await sent(journal) == []
    await journal.commit((), [event("c")])
    until = await journal.last_movable()
    assert until is not None
    taken = await journal.take(until, 9)
    assert taken is not None
    await journal.delete(*taken)
    assert journal.refusal() is None
    await journal.commit([row("d", b"x")])
    assert await keys(journal) == ["d"]


async def test_rows_are_bounded_by_number_too(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_ROWS", 2)
    await journal.commit([row("a")])
    with pytest.raises(DatabaseUnavailable, match="full"):
        await journal.commit([row("b"), row("c")])
    await journal.commit([row("b")])
    assert await keys(journal) == ["a", "b"]


async def test_a_row_that_was_moved_before_is_marked(journal: Journal) -> None:
    await journal.commit([row("a")])
    assert await keys(journal) == ["a"]
    await journal.commit([row("b")])
    until = await journal.last_movable()
    assert until is not None
    taken = await journal.take(until, 9)
    assert taken is not None
    assert [(entry.key, entry.again) for entry in taken[1].entries] == [("a", True), ("b", False)]
    await journal.commit([row("c")])
    await journal.delete(*taken)
    assert await keys(journal) == ["c"]


async def test_rows_of_another_process_are_seen(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        await one.commit([row("a")])
        assert await keys(other) == ["a"]
        await until(lambda: other.status()["rows"] == 1)


# Drafts


async def test_final_rows_replace_a_draft(journal: Journal) -> None:
    await journal.commit([row("run"), row("proposal")], draft="t-1")
    await journal.commit([row("other")], draft="t-2")
    assert await keys(journal) == []
    await journal.commit([row("final")], replaces="t-1")
    assert await keys(journal) == ["final"]
    assert journal.status()["rows"] == 2
    assert journal.rows_written == 2


async def test_a_draft_that_is_never_replaced_is_moved_as_it_is(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.commit([row("run")], draft="t-1")
    monkeypatch.setattr(rows, "DRAFT_SECONDS", 0.0)
    assert await keys(journal) == ["run"]
    monkeypatch.undo()
    # It may be in its table now, so it is no longer deleted.
    await journal.commit([row("final")], replaces="t-1")
    assert await keys(journal) == ["run", "final"]


async def test_a_batch_leaves_the_drafts_in_between(journal: Journal) -> None:
    await journal.commit([row("a")])
    await journal.commit([row("draft")], draft="t-1")
    await journal.commit([row("b")])
    until = await journal.last_movable()
    assert until is not None
    taken = await journal.take(until, 9)
    assert taken is not None
    assert [entry.key for entry in taken[1].entries] == ["a", "b"]
    await journal.delete(*taken)
    assert journal.status()["rows"] == 1
    await journal.commit([row("final")], replaces="t-1")
    assert await keys(journal) == ["final"]


# The outbox


async def test_events_leave_the_outbox_in_their_order(journal: Journal) -> None:
    await asyncio.gather(*(journal.commit((), [event(str(number))]) for number in range(5)))
    (first, second, *_) = await journal.outbox.head(9)
    assert [first.event.id, second.event.id] == ["0", "1"]
    assert first.number < second.number
    await journal.outbox.sent(second.number)
    assert await sent(journal) == ["2", "3", "4"]


async def test_an_event_that_is_committed_twice_is_sent_once(journal: Journal) -> None:
    await journal.commit((), [event("e")])
    await journal.commit((), [event("e")])
    assert await sent(journal) == ["e"]


async def test_only_one_process_sends_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        async with one.outbox.sending() as mine, other.outbox.sending() as too:
            assert (mine, too) == (True, False)
        async with other.outbox.sending() as mine:
            assert mine


async def test_the_outbox_notices_events_of_every_process(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        await other.commit()
        other.outbox.filled.clear()
        await one.commit((), [event("e")])
        assert one.outbox.filled.is_set()
        await asyncio.wait_for(other.outbox.filled.wait(), 5)
        assert await sent(other) == ["e"]
        assert one.outbox.id == ""
        await one.outbox.head(1)
        assert one.outbox.id == other.outbox.id != ""


async def test_the_oldest_events_are_dropped_for_new_ones(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "MOST_EVENTS", 2)
    await journal.commit((), [event(str(number)) for number in range(5)])
    assert await sent(journal) == ["3", "4"]
    assert journal.status()["events_dropped"] == 3
    assert "the journal dropped 3 events and 0 requests" in caplog.messages
    size = journal.status()["event_bytes"]
    monkeypatch.setattr(events, "MOST_BYTES", size - 1)
    await journal.commit((), [event("5")])
    assert await sent(journal) == ["5"]


async def test_events_are_dropped_after_seven_days(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.commit((), [event("old")])
    monkeypatch.setattr(writer, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(writer, "_MAINTAIN_TICKS", 1)
    now = Clock.now
    monkeypatch.setattr(Clock, "now", lambda self: now(self) + 7 * 86400 + 1)
    await until(lambda: journal.status()["events"] == 0)
    assert journal.status()["events_dropped"] == 1


async def test_what_a_full_journal_drops_is_logged_once_for_many_commits(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "MOST_EVENTS", 1)
    monkeypatch.setattr(writer, "TICK_SECONDS", 0.01)
    for number in range(5):
        await journal.commit((), [event(str(number))])
    dropped = [message for message in caplog.messages if "dropped" in message]
    assert dropped == ["the journal dropped 1 events and 0 requests"]
    monkeypatch.setattr(journal._writer, "_next_report", 0.0)
    await until(lambda: "the journal dropped 3 events and 0 requests" in caplog.messages)


@pytest.mark.parametrize("table", ["events", "requests"])
async def test_what_is_too_old_is_dropped_in_parts(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    # All in one transaction would take seconds, and others would miss their deadline.
    monkeypatch.setattr(totals, "MOST_DROPPED", 2)
    for number in range(4):
        await journal.claims.claim(RequestKey("", str(number)), "f")
        await journal.commit((), [event(str(number))])

    def drop(db: sqlite3.Connection) -> int:
        (newest,) = db.execute(f"SELECT max(time) FROM {table}").fetchone()
        return totals.drop_older(db, table, newest)

    # The newest one is not older than itself.
    assert [await journal._writer.run(drop) for _ in range(3)] == [2, 1, 0]
    await journal.commit()
    assert journal.status()[table] == 1


# Requests


async def test_a_request_is_answered_once(journal: Journal) -> None:
    assert await journal.claims.claim(KEY, "f") == Claim()
    await journal.commit([row("a")], (), Progress(KEY, state='{"step":1}'))
    await journal.commit([row("b")], (), Progress(KEY, response=b"answer"))
    assert await journal.claims.claim(KEY, "f") == Claim('{"step":1}', b"answer")
    # The same key of another caller is another request.
    assert await journal.claims.claim(RequestKey("other", KEY.key), "g") == Claim()
    assert journal.status()["requests"] == 2


async def test_a_key_of_another_request_is_refused(journal: Journal) -> None:
    await journal.claims.claim(KEY, "f")
    await journal.commit((), (), Progress(KEY, response=b"answer"))
    with pytest.raises(RequestKeyReused):
        await journal.claims.claim(KEY, "g")
    assert (await journal.claims.claim(KEY, "f")).response == b"answer"


async def test_a_key_of_another_running_request_is_refused_at_once(journal: Journal) -> None:
    await journal.claims.claim(KEY, "f")
    with pytest.raises(RequestKeyReused):
        await asyncio.wait_for(journal.claims.claim(KEY, "g"), 1)


@pytest.mark.parametrize("same_process", [True, False])
async def test_a_repeated_request_waits_for_the_first(tmp_path: Path, same_process: bool) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as two:
        other = one if same_process else two
        await one.claims.claim(KEY, "f")
        waiting = asyncio.create_task(other.claims.claim(KEY, "f"))
        await other.commit()
        assert not waiting.done()
        await one.commit((), (), Progress(KEY, response=b"answer"))
        assert await asyncio.wait_for(waiting, 5) == Claim(None, b"answer")


@pytest.mark.parametrize("same_process", [True, False])
async def test_a_failed_request_goes_on_from_its_state(tmp_path: Path, same_process: bool) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as two:
        other = one if same_process else two
        await one.claims.claim(KEY, "f")
        await one.commit((), (), Progress(KEY, state="half"))
        waiting = asyncio.create_task(other.claims.claim(KEY, "f"))
        await one.claims.release(KEY)
        assert await asyncio.wait_for(waiting, 5) == Claim("half")


async def test_a_failed_request_without_a_state_is_forgotten(journal: Journal) -> None:
    await journal.claims.claim(KEY, "f")
    await journal.claims.release(KEY)
    assert journal.status()["requests"] == 0
    assert await journal.claims.claim(KEY, "g") == Claim()


async def test_a_cancelled_claim_is_released(journal: Journal) -> None:
    claiming = asyncio.create_task(journal.claims.claim(KEY, "f"))
    await asyncio.sleep(0)
    claiming.cancel()
    assert await asyncio.wait_for(journal.claims.claim(KEY, "g"), 5) == Claim()


async def test_a_released_response_stays(journal: Journal) -> None:
    await journal.claims.claim(KEY, "f")
    await journal.commit((), (), Progress(KEY, response=b"answer"))
    await journal.claims.release(KEY)
    assert (await journal.claims.claim(KEY, "f")).response == b"answer"


async def test_a_request_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, signal, sys; from pathlib import Path\n"
        "from tests.integration.test_journal import *\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1])) as journal:\n"
        "        await journal.claims.claim(KEY, 'f')\n"
        "        await journal.commit((), (), Progress(KEY, state='half'))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    async with opened(tmp_path) as journal:
        assert await asyncio.wait_for(journal.claims.claim(KEY, "f"), 5) == Claim("half")
        assert len(list((tmp_path / "owners").iterdir())) == 1


async def test_the_oldest_finished_requests_are_forgotten(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_REQUESTS", 2)
    running = RequestKey("", "running")
    await journal.claims.claim(running, "f")
    for number in range(3):
        key = RequestKey("", str(number))
        await journal.claims.claim(key, "f")
        await journal.commit((), (), Progress(key, response=b"answer"))
    assert journal.status()["requests"] == 2
    assert journal.status()["requests_dropped"] == 2
    assert (await journal.claims.claim(RequestKey("", "2"), "f")).response == b"answer"
    await journal.commit((), (), Progress(running, response=b"late"))


async def test_requests_are_forgotten_after_a_day(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.claims.claim(KEY, "f")
    await journal.commit((), (), Progress(KEY, response=b"answer"))
    monkeypatch.setattr(writer, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(writer, "_MAINTAIN_TICKS", 1)
    now = Clock.now
    monkeypatch.setattr(Clock, "now", lambda self: now(self) + 86401)
    await until(lambda: journal.status()["requests"] == 0)


async def test_transactions_that_fail_together_leave_the_others(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 10)
    results = await asyncio.gather(
        *(journal.commit([row(str(size), b"x" * size)]) for size in (3, 11, 4, 12)),
        return_exceptions=True,
    )
    assert [isinstance(result, DatabaseUnavailable) for result in results] == [
        False, True, False, True
    ]  # fmt: skip
    assert await keys(journal) == ["3", "4"]


async def test_what_is_no_owner_costs_only_the_requests_that_it_owns(tmp_path: Path) -> None:
    (tmp_path / "owners" / "folder").mkdir(parents=True)
    async with opened(tmp_path) as journal:
        assert await journal.claims.claim(KEY, "f") == Claim()
    db = sqlite3.connect(tmp_path / NAME)
    with db:
        db.execute("UPDATE requests SET owner = 'folder'")
    db.close()
    async with opened(tmp_path) as journal:
        with pytest.raises(
            DatabaseUnavailable, match="The request cannot be claimed: Is a directory"
        ):
            await journal.claims.claim(KEY, "f")
        assert await journal.claims.claim(RequestKey("desk", "other"), "f") == Claim()

"""Few-shot examples: which corrections become one, and the message about the others."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import lancedb
import pytest

from llm_sidecar.db import (
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    PublishedFeedback,
    Store,
    cli_main,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.settings import Settings
from osiris.server import create_app

GOOD: Final = {
    "ticker": "ABC",
    "action": "pass",
    "confidence": 0.7,
    "rationale": "The trend needs room.",
}
CHANNEL: Final = "phi3.feedback.submitted"
IS_EXAMPLE: Final = "Feedback stored; the corrected proposal is an example for the next ones."


class Running:
    """A sidecar in this process, without models."""

    def __init__(self, client: httpx.AsyncClient, folder: Path) -> None:
        self.client = client
        self.folder = folder

    async def log_runs(self, *run_ids: str, prompt: str = "Long ABC") -> None:
        """Stores runs as another process does."""
        store = await Store.open(self.folder)
        for run_id in run_ids:
            await store.append(
                OrchestratorRunSchema(
                    run_id=run_id, input_query=prompt, final_output="", status="success"
                )
            )
        # A query first moves the logged rows to the tables.
        await store.last("orchestrator_runs", 1)
        await store.close()

    async def correct(
        self, transaction_id: str, proposal: dict[str, Any] = GOOD, **changes: Any
    ) -> tuple[str, str]:
        """Sends a correction; returns the message and the feedback_id."""
        body = {
            "transaction_id": transaction_id,
            "feedback_type": "correction",
            "feedback_content": "x",
            "corrected_proposal": proposal,
        }
        answer = await self.client.post("/feedback/phi3/", json=body | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()["message"], answer.headers["X-Feedback-ID"]

    async def examples(self) -> list[str]:
        """The transaction_ids of the examples in use."""
        answer = await self.client.get("/examples/")
        assert answer.status_code == 200
        assert answer.json()["next"] is None
        return [item["transaction_id"] for item in answer.json()["items"]]

    async def database(self) -> dict[str, Any]:
        health: dict[str, Any] = (await self.client.get("/health")).json()
        return dict(health["database"])

    async def until(self, *transaction_ids: str) -> None:
        """Returns once these are the examples in use."""
        async with asyncio.timeout(20):
            while await self.examples() != list(transaction_ids):
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(folder: Path, state: str = "open", **environ: str) -> AsyncIterator[Running]:
    """A sidecar on the database in `folder`, once that is in the given state."""
    settings = {"LANCEDB_URI": str(folder), "REDIS_URL": "memory://"}
    app = create_app(Settings.from_environ(settings | environ))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://sidecar") as client,
    ):
        sidecar = Running(client, folder)
        async with asyncio.timeout(30):
            while (await sidecar.database())["state"] != state:
                await asyncio.sleep(0.02)
        yield sidecar


@pytest.fixture
async def sidecar(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "db") as made:
        yield made


def small_model(folder: Path, context_length: int) -> str:
    """The path of a model that is never loaded, of which the context alone is known."""
    folder.mkdir()
    config = {"model": {"context_length": context_length}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return str(folder)


async def test_the_examples_in_use_are_listed_oldest_first(sidecar: Running) -> None:
    ids = {}
    for number in range(4):
        name = f"t-{number}"
        await sidecar.log_runs(name, prompt=f"Prompt {number}")
        message, ids[name] = await sidecar.correct(name, GOOD | {"confidence": number / 10})
        assert message == IS_EXAMPLE
    answers = [await sidecar.client.get(path) for path in ("/examples", "/examples/")]
    expected = [
        {
            "transaction_id": f"t-{number}",
            "feedback_id": ids[f"t-{number}"],
            "prompt": f"Prompt {number}",
            "proposal": GOOD | {"confidence": number / 10},
        }
        for number in (1, 2, 3)
    ]
    assert [answer.json() for answer in answers] == [{"items": expected, "next": None}] * 2


async def test_the_list_of_examples_has_pages(sidecar: Running) -> None:
    names = ["t-0", "t-1", "t-2"]
    await sidecar.log_runs(*names)
    for name in names:
        await sidecar.correct(name)
    seen: list[str] = []
    before: dict[str, Any] = {}
    for _ in range(3):
        page = (await sidecar.client.get("/examples/", params={"limit": 1} | before)).json()
        seen += [item["transaction_id"] for item in page["items"]]
        before = {"before": page["next"]}
    assert seen == names
    assert before == {"before": None}
    for query in ("limit=0", "limit=501", "before=nothing"):
        answer = await sidecar.client.get(f"/examples/?{query}")
        assert answer.status_code == 422
        assert query.partition("=")[0] in answer.text


async def test_a_timestamp_says_nothing_of_the_order(sidecar: Running) -> None:
    now = datetime.datetime.now(datetime.UTC)
    minutes = {"t-0": 4, "t-1": -1000, "t-2": 0, "t-3": -1}
    await sidecar.log_runs(*minutes)
    for name, number in minutes.items():
        when = now + datetime.timedelta(minutes=number)
        message, _ = await sidecar.correct(name, timestamp=when.isoformat())
        assert message == IS_EXAMPLE
    assert await sidecar.examples() == ["t-1", "t-2", "t-3"]


async def test_the_order_of_arrival_outlives_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path / "db") as first:
        await first.log_runs("t-0", "t-1", "t-2")
        for number in range(3):
            await first.correct(f"t-{number}", timestamp=f"2026-01-0{3 - number}")
    async with running(tmp_path / "db") as second:
        await second.until("t-0", "t-1", "t-2")


async def test_a_timestamp_of_the_future_or_of_digits_is_422_and_names_the_field(
    sidecar: Running,
) -> None:
    body = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
    for timestamp in ("2099-01-01T00:00:00Z", "20990101T000000Z", "20260131", "1769817600", 0):
        answer = await sidecar.client.post("/feedback/phi3/", json=body | {"timestamp": timestamp})
        assert answer.status_code == 422
        assert [entry["loc"] for entry in answer.json()["detail"]] == [["body", "timestamp"]]
    assert (await sidecar.database())["rows_written"] == 0


async def test_the_newer_correction_of_a_run_replaces_the_older(sidecar: Running) -> None:
    name = "t"
    await sidecar.log_runs(name)
    older = {"timestamp": "2026-01-01", "feedback_content": "older"}
    await sidecar.correct(name, GOOD | {"confidence": 0.1}, **older)
    _, newer_id = await sidecar.correct(name, GOOD | {"confidence": 0.2})
    (item,) = (await sidecar.client.get("/examples/")).json()["items"]
    assert (item["feedback_id"], item["proposal"]["confidence"]) == (newer_id, 0.2)
    # The same again is the same row, which has arrived before the other.
    message, _ = await sidecar.correct(name, GOOD | {"confidence": 0.1}, **older)
    assert message == (
        "Feedback stored; the corrected proposal is not an example, because a newer "
        "correction of the same run is one."
    )


async def test_feedback_that_is_no_example_says_the_true_reason(sidecar: Running) -> None:
    for name, prompt in (
        ("long", "p" * 2001),
        ("wide", "価" * 1500),
        ("good", "Long ABC"),
    ):
        await sidecar.log_runs(name, prompt=prompt)
    for transaction_id, proposal, reason in (
        ("good", {**GOOD, "secret key": 1}, "corrected_proposal is not a valid proposal (*), "
         "so it is not an example."),
        ("good", {"ticker": ""}, "corrected_proposal is not a valid proposal (action, confidence, "
         "rationale, ticker), so it is not an example."),
        ("good", GOOD | {"rationale": "x" * 437}, "the corrected proposal is not an example, "
         "because it takes more than 500 characters as JSON."),
        ("unknown", GOOD, "the corrected proposal is not an example, because no run with this "
         "transaction_id is stored."),
        ("long", GOOD, "the corrected proposal is not an example, because the prompt of its "
         "run has more than 2000 characters."),
        ("wide", GOOD, "the corrected proposal is not an example, because it and the prompt of "
         "its run may take more than 3000 tokens, or more than half of the model's context (each "
         "byte counts as one token)."),
    ):  # fmt: skip
        message, _ = await sidecar.correct(transaction_id, proposal)
        assert message == f"Feedback stored; {reason}"
    body = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
    answer = await sidecar.client.post("/feedback/phi3/", json=body)
    assert answer.json()["message"] == "Feedback stored."
    assert await sidecar.examples() == []


async def test_a_correction_that_newer_ones_crowd_out_says_so(tmp_path: Path) -> None:
    async with running(tmp_path / "db", FEW_SHOT_EXAMPLES="1") as sidecar:
        await sidecar.log_runs("first", "second")
        await sidecar.correct("first", timestamp="2026-01-01")
        await sidecar.correct("second")
        message, _ = await sidecar.correct("first", timestamp="2026-01-01")
        assert message == (
            "Feedback stored; the corrected proposal is not an example, because newer ones "
            "leave no space for it."
        )
        assert await sidecar.examples() == ["second"]


async def test_without_examples_a_correction_says_that_they_are_off(tmp_path: Path) -> None:
    async with running(tmp_path / "db", FEW_SHOT_EXAMPLES="0") as sidecar:
        await sidecar.log_runs("t")
        message, _ = await sidecar.correct("t")
        assert message == (
            "Feedback stored; the corrected proposal is not an example, because few-shot examples "
            "are off; FEW_SHOT_EXAMPLES turns them on."
        )
        assert await sidecar.examples() == []


async def test_examples_that_are_too_much_for_the_model_give_way_from_the_oldest_on(
    tmp_path: Path,
) -> None:
    model = small_model(tmp_path / "model", 2000)
    async with running(tmp_path / "db", MICRO_LLM_MODEL_PATH=model) as sidecar:
        names = ["t-0", "t-1", "t-2"]
        # An example of 500 tokens at most: half of the context holds two.
        await sidecar.log_runs(*names, prompt="p" * 383)
        await sidecar.log_runs("large", prompt="p" * 1000)
        for name in names:
            message, _ = await sidecar.correct(name)
            assert message == IS_EXAMPLE
        assert await sidecar.examples() == ["t-1", "t-2"]
        message, _ = await sidecar.correct("large")
        assert "more than half of the model's context" in message
        assert await sidecar.examples() == ["t-1", "t-2"]


async def test_useless_corrections_displace_no_example(sidecar: Running) -> None:
    await sidecar.log_runs("t")
    await sidecar.correct("t")
    # More than are read at once.
    for number in range(70):
        await sidecar.correct("t", {"ticker": "ABC"}, feedback_content=f"bad {number}")
    await asyncio.gather(*(sidecar.correct(f"unknown-{number}") for number in range(70)))
    assert await sidecar.examples() == ["t"]


async def test_many_corrections_at_once_leave_the_latest(sidecar: Running) -> None:
    names = [f"t-{number}" for number in range(12)]
    await sidecar.log_runs(*names)
    await asyncio.gather(*map(sidecar.correct, names))
    await sidecar.correct(names[0])
    used = await sidecar.examples()
    assert (len(used), used[-1]) == (3, "t-0")


# Withdrawing


async def test_a_withdrawn_correction_is_no_example_and_the_one_before_it_is_again(
    sidecar: Running,
) -> None:
    name = "t"
    await sidecar.log_runs(name)
    _, older = await sidecar.correct(name, GOOD | {"confidence": 0.1})
    _, newer = await sidecar.correct(name, GOOD | {"confidence": 0.2})
    for path, left in ((newer, [older]), (newer, [older]), (f"{older}/", [])):
        answer = await sidecar.client.delete(f"/feedback/{path}")
        feedback_id = path.removesuffix("/")
        assert answer.status_code == 200
        assert answer.json() == {"message": "Feedback withdrawn.", "feedback_id": feedback_id}
        items = (await sidecar.client.get("/examples/")).json()["items"]
        assert [item["feedback_id"] for item in items] == left


async def test_what_is_withdrawn_stays_so_when_it_is_sent_again(sidecar: Running) -> None:
    name = "t"
    await sidecar.log_runs(name)
    _, feedback_id = await sidecar.correct(name, timestamp="2026-01-01")
    await sidecar.client.delete(f"/feedback/{feedback_id}")
    message, again = await sidecar.correct(name, timestamp="2026-01-01")
    assert again == feedback_id
    assert message == (
        "Feedback stored; the corrected proposal is not an example, because this "
        "feedback was withdrawn."
    )
    assert await sidecar.examples() == []


async def test_feedback_that_is_no_example_can_be_withdrawn_too(sidecar: Running) -> None:
    body = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
    answer = await sidecar.client.post("/feedback/phi3/", json=body)
    feedback_id = answer.headers["X-Feedback-ID"]
    assert (await sidecar.client.delete(f"/feedback/{feedback_id}")).status_code == 200


@pytest.mark.parametrize("feedback_id", ["a\nb", "\n", "a\n", "a/", "/", "a b?#%2F"])
async def test_feedback_of_another_service_is_withdrawn_whatever_its_id(
    sidecar: Running, feedback_id: str
) -> None:
    store = await Store.open(sidecar.folder)
    row = PublishedFeedback(
        transaction_id="t",
        feedback_id=feedback_id,
        feedback_type="rating",
        feedback_content="5",
    )
    await store.append(row)
    # A query first moves the logged rows to the tables.
    await store.last("phi3_feedback", 1)
    await store.close()
    path = urllib.parse.quote(feedback_id, safe="")
    answer = await sidecar.client.delete(f"/feedback/{path}/")
    assert (answer.status_code, answer.json()) == (
        200,
        {"message": "Feedback withdrawn.", "feedback_id": feedback_id},
    )


async def test_withdrawing_what_is_not_there_is_404(sidecar: Running) -> None:
    for feedback_id in ("unknown", "a%2Fb/", "a'%20or%20'1'='1", "phi3"):
        answer = await sidecar.client.delete(f"/feedback/{feedback_id}")
        assert answer.status_code == 404
        assert answer.json() == {"detail": "There is no feedback with this feedback_id."}
    assert (await sidecar.database())["rows_written"] == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 129, "String should have at most 128 characters"),
        ("/", "String should have at least 1 character"),
    ],
    ids=["long", "empty"],
)
async def test_an_id_of_another_length_is_422(sidecar: Running, path: str, message: str) -> None:
    answer = await sidecar.client.delete(f"/feedback/{path}")
    assert answer.status_code == 422
    (entry,) = answer.json()["detail"]
    assert (entry["loc"], entry["msg"]) == (["path", "feedback_id"], message)


async def test_a_withdrawal_adds_one_row_and_removes_none(sidecar: Running) -> None:
    await sidecar.log_runs("t")
    _, feedback_id = await sidecar.correct("t")
    for _ in range(2):
        await sidecar.client.delete(f"/feedback/{feedback_id}")
    store = await Store.open(sidecar.folder)
    tables = await store.transaction("t")
    await store.close()
    assert [row["feedback_id"] for row in tables["phi3_feedback"]] == [feedback_id]
    assert [row["feedback_id"] for row in tables["feedback_withdrawals"]] == [feedback_id]


async def test_while_the_database_is_away_what_is_known_can_be_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "db"
    monkeypatch.setenv("LANCEDB_URI", str(folder))
    # A table of an older version: rows are taken, and not moved before `migrate`.
    old = [{"run_id": "t", "timestamp": "2026-01-01", "input_query": "Long ABC"}]
    lancedb.connect(folder).create_table("orchestrator_runs", old)
    async with running(folder, state="away") as sidecar:
        message, feedback_id = await sidecar.correct("t")
        assert message == (
            "Feedback stored; until the database is back, it is not known whether the corrected "
            "proposal is an example."
        )
        _, kept = await sidecar.correct("t", feedback_content="another")
        known = await sidecar.client.delete(f"/feedback/{feedback_id}")
        unknown = await sidecar.client.delete("/feedback/unknown")
        assert (known.status_code, unknown.status_code) == (200, 503)
        assert unknown.headers["Retry-After"] == "5"
        assert (await sidecar.database())["rows_written"] == 3
    assert await asyncio.to_thread(cli_main, ["migrate"]) == 0
    async with running(folder) as sidecar:
        await sidecar.until("t")
        (item,) = (await sidecar.client.get("/examples/")).json()["items"]
        assert item["feedback_id"] == kept


async def test_an_example_in_use_can_be_withdrawn_while_the_database_cannot_be_read(
    sidecar: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sidecar.log_runs("t", "other")
    _, feedback_id = await sidecar.correct("t")
    await sidecar.correct("other")

    async def fail(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("The database cannot be read.", retry_after=5)

    for method in ("recent_corrections", "feedback_transaction"):
        monkeypatch.setattr(Store, method, fail)
    assert (await sidecar.client.delete("/feedback/unknown")).status_code == 503
    assert (await sidecar.client.delete(f"/feedback/{feedback_id}")).status_code == 200
    assert await sidecar.examples() == ["other"]
    monkeypatch.undo()
    # What is read again is without it.
    await sidecar.correct("unknown")
    assert await sidecar.examples() == ["other"]


# Over the event bus


def published(transaction_id: str = "t", **changes: Any) -> str:
    feedback = {
        "transaction_id": transaction_id,
        "feedback_type": "correction",
        "feedback_content": "published",
        "corrected_proposal": GOOD,
        "timestamp": "2026-01-01T00:00:00Z",
    }
    return json.dumps(feedback | changes)


@contextlib.asynccontextmanager
async def bus(url: str) -> AsyncIterator[EventBus]:
    made = EventBus(url)
    await made.connect()
    try:
        yield made
    finally:
        await made.close()


async def wait_for_rows(sidecar: Running, count: int) -> None:
    async with asyncio.timeout(20):
        while (await sidecar.database())["rows_written"] < count:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(("allowed", "expected"), [("false", ["ours"]), ("true", ["ours", "t"])])
async def test_published_feedback_is_stored_and_an_example_only_where_that_is_allowed(
    tmp_path: Path, allowed: str, expected: list[str]
) -> None:
    url = f"memory://{tmp_path}"
    environ = {"REDIS_URL": url, "EXAMPLES_FROM_BUS": allowed}
    async with running(tmp_path / "db", **environ) as sidecar, bus(url) as other:
        await sidecar.log_runs("ours", "t")
        await sidecar.correct("ours")
        await other.publish(CHANNEL, published())
        await wait_for_rows(sidecar, 2)
        # Each sidecar that receives a correction reads the examples again.
        await sidecar.correct("unknown")
        await sidecar.until(*expected)
        store = await Store.open(tmp_path / "db")
        rows = await store.last("phi3_feedback", 0)
        await store.close()
    sources = {row["transaction_id"]: row["source"] for row in rows}
    assert sources == {"ours": "direct", "unknown": "direct", "t": "bus"}


async def test_a_message_that_claims_what_it_may_not_is_not_stored(tmp_path: Path) -> None:
    url = f"memory://{tmp_path}"
    forged: tuple[dict[str, Any], ...] = (
        {"source": "direct"},
        {"received": "2026-01-01T00:00:00Z"},
        {"row_id": "x"},
        {"timestamp": "2099-01-01T00:00:00Z"},
        {"timestamp": "20260131"},
        {"timestamp": 1769817600},
    )
    async with running(tmp_path / "db", REDIS_URL=url) as sidecar, bus(url) as other:
        for changes in forged:
            await other.publish(CHANNEL, published(**changes))
        await other.publish(CHANNEL, published("next"))
        await wait_for_rows(sidecar, 1)
    # Closing has moved what was stored.
    store = await Store.open(tmp_path / "db")
    rows = await store.last("phi3_feedback", 0)
    await store.close()
    assert [row["transaction_id"] for row in rows] == ["next"]


async def test_a_message_with_the_id_of_a_correction_does_not_take_its_place(
    tmp_path: Path,
) -> None:
    url = f"memory://{tmp_path}"
    when = "2026-01-01T00:00:00+00:00"
    mine = Phi3FeedbackSchema(
        transaction_id="t",
        timestamp=when,
        feedback_type="correction",
        feedback_content="x",
        corrected_proposal=GOOD,
    )
    feedback_id = mine.as_row()["feedback_id"]
    async with running(tmp_path / "db", REDIS_URL=url) as sidecar, bus(url) as other:
        await sidecar.log_runs("t")
        forged = published(feedback_id=feedback_id, corrected_proposal=GOOD | {"action": "abort"})
        await other.publish(CHANNEL, forged)
        await wait_for_rows(sidecar, 1)
        message, stored = await sidecar.correct("t", timestamp=when)
        assert (message, stored) == (IS_EXAMPLE, feedback_id)
        (item,) = (await sidecar.client.get("/examples/")).json()["items"]
        assert item["proposal"] == GOOD


async def test_sidecars_on_one_database_store_feedback_once_and_share_its_example(
    tmp_path: Path,
) -> None:
    environ = {"REDIS_URL": f"memory://{tmp_path}"}
    async with (
        running(tmp_path / "db", **environ) as one,
        running(tmp_path / "db", **environ) as other,
        running(tmp_path / "elsewhere", **environ) as stranger,
    ):
        await one.log_runs("t")
        began = asyncio.get_running_loop().time()
        await one.correct("t")
        await other.until("t")
        # By the event, not by the next look half a minute later.
        assert asyncio.get_running_loop().time() - began < 15
        await wait_for_rows(stranger, 1)
        assert (await other.database())["rows_written"] == 0
    for folder, source in (("db", "direct"), ("elsewhere", "bus")):
        store = await Store.open(tmp_path / folder)
        rows = await store.last("phi3_feedback", 0)
        await store.close()
        assert [row["source"] for row in rows] == [source]


async def test_a_sidecar_does_not_store_its_own_event_before_the_database_is_open(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "db"
    lancedb.connect(folder).create_table("orchestrator_runs", [{"run_id": "t"}])
    async with running(folder, state="away") as sidecar:
        await sidecar.correct("t")
        await sidecar.correct("t", feedback_content="another")
        assert (await sidecar.database())["rows_written"] == 2


def test_published_feedback_is_told_from_ours_by_its_type_alone() -> None:
    fields = json.loads(published())
    ours, theirs = Phi3FeedbackSchema(**fields).as_row(), PublishedFeedback(**fields).as_row()
    assert ours["feedback_id"] == theirs["feedback_id"]
    assert (ours["source"], theirs["source"]) == ("direct", "bus")
    assert theirs["row_id"] == f"bus:{ours['row_id']}"


# In the prompt


async def test_a_hostile_correction_changes_no_prompt_and_a_good_one_does(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    async with running(tmp_path / "db", **random_models) as sidecar:

        async def prompt_tokens() -> int:
            body = {"prompt": "Short XYZ at 244."}
            answer = await sidecar.client.post("/generate/phi3/", json=body, timeout=60)
            assert answer.status_code == 200
            return int(answer.headers["X-Prompt-Tokens"])

        await sidecar.log_runs("t-0", "t-1", "t-2", "good")
        before = await prompt_tokens()
        for number, rationale in enumerate(("A" + "a" * 30_000, "Room. " * 5_000, "価" * 9000)):
            message, _ = await sidecar.correct(f"t-{number}", GOOD | {"rationale": rationale})
            assert "more than 500 characters" in message
        assert await prompt_tokens() == before
        _, feedback_id = await sidecar.correct("good")
        assert await prompt_tokens() > before + 20
        await sidecar.client.delete(f"/feedback/{feedback_id}")
        assert await prompt_tokens() == before

"""Profiles of a real server's requests, and their page in a real browser."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from llm_sidecar.telemetry.profiling import Profiling
from tests.live_server import LiveServer, serve

pytestmark = pytest.mark.own_process("a process shows the profiles of its own requests")

PROMPT = {"prompt": "Long ZXQSECRET from 100, now 112.5."}


@pytest.fixture(scope="module")
def profiled(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    environ = {**random_models, "MODEL_LOAD_WAIT_SECONDS": "60", "ENABLE_PROFILING": "true"}
    with serve(tmp_path_factory.mktemp("profiled"), **environ) as running:
        running.wait_until_ready()
        yield running


class Page(HTMLParser):
    """The cells of the table of model calls, and the URLs that the page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag == "td"
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)
            self._in_cell = False


def test_the_latest_request_is_shown_overall_and_by_route(
    profiled: LiveServer,
) -> None:
    assert profiled.client.get("/debug/prof").status_code == 404
    assert profiled.client.post("/generate/phi3", json=PROMPT).is_success
    assert profiled.client.post("/score/hermes/", json={"proposal": {"a": 1}}).is_success
    assert profiled.client.get("/health").is_success
    for spelling in ("/debug/prof", "/debug/prof/"):
        answer = profiled.client.get(spelling)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "POST /score/hermes/: 200" in answer.text
    for spelling in ("/generate/phi3", "/generate/phi3/"):
        answer = profiled.client.get("/debug/prof", params={"path": spelling})
        assert "POST /generate/phi3: 200" in answer.text
    answer = profiled.client.get("/debug/prof", params={"path": "/speak"})
    assert answer.status_code == 404
    assert answer.json() == {"detail": "No such request has been profiled yet."}


def test_the_page_has_the_times_of_each_model_call_and_loads_nothing(
    profiled: LiveServer,
) -> None:
    answer = profiled.client.post("/propose_trade_adjustments/", json=PROMPT)
    assert answer.is_success
    text = profiled.client.get("/debug/prof").text
    page = Page(text)
    phi3, critique, score = page.cells[:8], page.cells[8:15], page.cells[-6:]
    tokens = f"{answer.headers['X-Prompt-Tokens']} + {answer.headers['X-Completion-Tokens']}"
    assert (phi3[0], phi3[1], phi3[6]) == (answer.headers["X-Model"], "generate", tokens)
    assert all(cell.endswith(" s") for cell in phi3[2:6])
    assert critique[1] == "generate"
    assert "score_choices" in score
    assert page.fetched == []
    assert "ZXQSECRET" not in text
    # The tree shows where the event loop spent its time.
    assert "propose_trade_adjustments" in text


def test_the_page_works_in_a_browser(profiled: LiveServer, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    assert profiled.client.post("/generate/phi3/", json=PROMPT).is_success
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"),
        f"{profiled.url}/debug/prof?path=/generate/phi3/",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    dom = done.stdout
    assert 'id="model-calls"' in dom
    # Only the script of the page can have created these rows.
    assert "call-stack" in dom
    assert "Refused to" not in done.stderr


@pytest.fixture
async def requests() -> AsyncIterator[tuple[Profiling, httpx.AsyncClient]]:
    app = FastAPI()
    profiling = Profiling()
    profiling.install(app)
    gate = asyncio.Barrier(2)

    @app.get("/items/{item}")
    async def item(item: int) -> None:
        await gate.wait()

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield profiling, client


async def test_concurrent_requests_are_profiled_separately_and_one_is_kept_per_route(
    requests: tuple[Profiling, httpx.AsyncClient],
) -> None:
    profiling, client = requests
    answers = await asyncio.gather(client.get("/items/1"), client.get("/items/2"))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert (await client.get("/nowhere")).status_code == 404
    kept = profiling.latest()
    assert kept is not None
    assert (kept.route, kept.status) == ("/items/{item}", 200)
    assert profiling.latest("/items/{item}/") is kept
    assert profiling.latest("/nowhere") is None
    assert "No model was called." in kept.page()


def test_under_load_few_requests_are_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    profiling = Profiling()
    assert [profiling.admits() for _ in range(5)] == 3 * [True] + 2 * [False]
    clock += 25
    assert [profiling.admits() for _ in range(3)] == [True, True, False]
    clock += 3600
    assert sum(profiling.admits() for _ in range(100)) == 3

"""A client generated from the OpenAPI document, and `/docs`."""

from __future__ import annotations

import compileall
import contextlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from osiris.schemas.health import Health
from tests.live_server import LiveServer, serve

KEY = "a-key-of-the-tests-0123"
PROMPT = "Long AAPL from 182.40, now 191.10, RSI 78."
PROPOSAL = {"ticker": "AAPL", "action": "pass", "confidence": 0.5, "rationale": "Wait for it."}
GENERATOR = str(Path(sys.executable).parent / "openapi-python-client")
PACKAGE = "generated_client_of_the_tests"
OPTIONS = {
    # Without formatting. The generator knows only this media type for bytes.
    "post_hooks": [],
    "content_type_overrides": {"audio/wav": "application/octet-stream"},
    # The server makes the document at the first request. On a busy machine this takes more than
    # the 5 s that the generator waits.
    "http_timeout": 60,
}


@pytest.fixture(scope="module")
def guarded(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with a key, metrics and profiles."""
    with serve(
        tmp_path_factory.mktemp("guarded"),
        PRELOAD_MODELS="true",
        SIDECAR_API_KEYS=KEY,
        ENABLE_METRICS="true",
        ENABLE_PROFILING="true",
        **random_models,
    ) as running:
        running.wait_until_ready()
        running.client.headers["X-API-Key"] = KEY
        running.wait_until_database_is_open()
        yield running


# A generated client


@pytest.fixture(scope="module")
def generated(guarded: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package that the generator writes from the served document; a warning is an error."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    command = [
        *(GENERATOR, "generate", "--url", f"{guarded.url}/openapi.json", "--meta", "none"),
        *("--config", str(folder / "options.json"), "--fail-on-warning"),
        *("--output-path", str(folder / PACKAGE)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(PACKAGE)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def models(generated: Any) -> Any:
    return importlib.import_module(f"{PACKAGE}.models")


class Operations:
    """Calls operations of the generated client by their ids."""

    def __init__(self, client: Any, folder: Path) -> None:
        self.client = client
        self._modules = {path.stem: path.parent.name for path in folder.glob("api/*/[a-z]*.py")}

    @property
    def names(self) -> set[str]:
        return set(self._modules)

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{PACKAGE}.api.{self._modules[name]}.{name}")

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        return self.module(name).sync(*args, client=self.client, **options)


@pytest.fixture(scope="module")
def ask(guarded: LiveServer, generated: Any) -> Iterator[Operations]:
    with generated.AuthenticatedClient(guarded.url, KEY, timeout=60) as client:
        yield Operations(client, Path(generated.__file__).parent)


def test_every_generated_module_compiles_and_imports(generated: Any) -> None:
    assert compileall.compile_dir(generated.__path__[0], quiet=1, force=True)
    for module in pkgutil.walk_packages(generated.__path__, f"{PACKAGE}."):
        importlib.import_module(module.name)


def test_every_operation_is_called_with_the_generated_client(ask: Operations) -> None:
    source = Path(__file__).read_text()
    tried = {name for name in ask.names if re.search(rf'ask(\.module)?\(\s*"{name}"', source)}
    assert tried == ask.names


def test_the_generated_client_reads_proposals_and_texts(ask: Operations, models: Any) -> None:
    request = models.PromptRequest(prompt=PROMPT, max_length=8)
    assert isinstance(ask("generate_hermes", body=request).generated_text, str)
    request = models.GenerateRequest(prompt=PROMPT)
    request.model_id = models.GenerateRequestModelIdType0.PHI3
    for made in (
        ask("generate", body=request),
        ask("generate_phi3", body=models.ProposalRequest(prompt=PROMPT)),
    ):
        assert isinstance(made, models.Proposal)
        assert made.action in models.ProposalAction
        assert 0 <= made.confidence <= 1
    walked = ask("propose_trade_adjustments", body=models.ProposalRequest(prompt=PROMPT))
    assert isinstance(walked.phi3_proposal, models.Proposal)
    assert walked.transaction_id.version == 4


def test_the_generated_client_scores(ask: Operations, models: Any) -> None:
    body = models.ScoreRequest(models.ScoreRequestProposal.from_dict(PROPOSAL), context=PROMPT)
    score = ask("score_hermes", body=body)
    assert 0 <= score.score <= 1


def test_the_generated_client_sends_lists_and_withdraws_feedback(
    guarded: LiveServer, ask: Operations, models: Any
) -> None:
    walked = ask("propose_trade_adjustments", body=models.ProposalRequest(prompt=PROMPT))
    body = models.FeedbackRequest.from_dict(
        {
            "transaction_id": str(walked.transaction_id),
            "feedback_type": "correction",
            "feedback_content": {"by": "a test"},
            "corrected_proposal": PROPOSAL,
        }
    )
    sent = ask.module("submit_feedback").sync_detailed(client=ask.client, body=body)
    assert sent.parsed.transaction_id == str(walked.transaction_id)

    def found() -> list[Any]:
        items = ask("list_examples", limit=500).items
        return [item for item in items if item.transaction_id == sent.parsed.transaction_id]

    # Another sidecar learns of it within two seconds.
    (item,) = guarded.wait_until(found, 5)
    assert item.proposal.to_dict() == PROPOSAL
    feedback_id = sent.headers["X-Feedback-ID"]
    assert item.feedback_id == feedback_id
    withdrawn = ask("withdraw_feedback", feedback_id)
    assert withdrawn.feedback_id == feedback_id
    missing = ask("withdraw_feedback", "no-such-feedback")
    assert isinstance(missing, models.ErrorBody)


def test_the_generated_client_speaks_and_listens(ask: Operations, models: Any) -> None:
    listening = ask.module("stream_audio")._get_kwargs()
    with ask.client.get_httpx_client().stream(**listening) as stream:
        body = models.SpeakRequest("Take the profit.")
        assert ask("speak", body=body).payload.read().startswith(b"RIFF")
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert next(line for line in stream.iter_lines() if line.startswith("data: UklGR"))


def test_the_generated_client_follows_events_and_reads_dead_letters(
    ask: Operations, models: Any
) -> None:
    listening = ask.module("stream_events")._get_kwargs(types="phi3.feedback.submitted")
    with ask.client.get_httpx_client().stream(**listening) as stream:
        sent = models.FeedbackRequest("t", models.FeedbackRequestFeedbackType.RATING, "5")
        assert ask("submit_feedback", body=sent).transaction_id == "t"
        assert "event: phi3.feedback.submitted" in stream.iter_lines()
    assert ask("list_dead_letters", limit=5).items == []
    missing = ask("requeue_dead_letter", "1-0")
    assert isinstance(missing, models.ErrorBody)


def test_the_generated_client_chats_as_with_openai(ask: Operations, models: Any) -> None:
    assert [model.id for model in ask("list_models").data] == ["phi3", "hermes"]
    assert ask("get_model", "phi3").owned_by == "osiris"
    body = models.ChatRequest.from_dict(
        {"model": "phi3", "messages": [{"role": "user", "content": PROMPT}]}
    )
    (choice,) = ask("create_chat_completion", body=body).choices
    assert set(json.loads(choice.message.content)) >= {"ticker", "action"}
    text = {"model": "phi3", "prompt": "Long A", "max_tokens": 1}
    body = models.CompletionRequest.from_dict(text)
    assert ask("create_completion", body=body).usage.completion_tokens == 1
    body = models.ResponseRequest.from_dict({"model": "phi3", "input": PROMPT})
    assert ask("create_response", body=body).to_dict()["status"] == "completed"
    question = {"type": "predicate", "instructions": "The position is overbought."}
    asked = {"model": "phi3", "input": PROMPT, "questions": [question]}
    decided = ask("decide", body=models.DecisionRequest.from_dict(asked))
    assert len(decided.to_dict()["answers"]) == 1
    body = models.SpeechRequest.from_dict({"model": "tts-1", "voice": "alloy", "input": "Hold."})
    assert ask("create_speech", body=body).payload.read().startswith(b"RIFF")
    missing = ask("get_model", "gpt-4")
    assert missing.error.code == "model_not_found"


def test_the_generated_client_gets_a_response_and_speech_as_with_openai(
    ask: Operations, models: Any
) -> None:
    body = models.ResponseRequest.from_dict({"model": "phi3", "input": PROMPT})
    assert ask("create_response", body=body)["status"] == "completed"
    text = {"model": "tts-1", "voice": "alloy", "input": "Take the profit."}
    body = models.SpeechRequest.from_dict(text)
    assert ask("create_speech", body=body).payload.read().startswith(b"RIFF")


def test_the_generated_client_reads_states(ask: Operations, models: Any) -> None:
    health = ask("health")
    assert isinstance(health, models.Health)
    assert health.models["phi3"].state is models.ModelHealthState.READY
    assert health.database.state is models.DatabaseHealthState.OPEN
    assert ask("health_live").status is models.ProbeStatus.OK
    assert ask("health_ready").missing == []
    swapped = ask("swap_adapters", body=models.AdapterChoice())
    assert swapped.phi3_adapter_date is None
    assert "http_requests_total" in ask("scrape_metrics")


@pytest.mark.own_process("a process shows the profiles of its own requests")
def test_the_generated_client_reads_a_profile(ask: Operations, models: Any) -> None:
    ask("generate_phi3", body=models.ProposalRequest(prompt=PROMPT))
    assert 'id="model-calls"' in ask("profile")


def test_the_generated_client_reads_errors(ask: Operations, models: Any) -> None:
    blank = ask("generate_phi3", body=models.ProposalRequest(prompt=" "))
    assert [entry.loc for entry in blank.detail] == [["body", "prompt"]]
    short = ask("generate_phi3", body=models.ProposalRequest(prompt=PROMPT, max_length=1))
    assert short.detail.startswith("max_length: ")


def test_health_has_the_documented_keys_and_no_others(guarded: LiveServer) -> None:
    """The server does not validate `/health`, so this test compares it with its model."""
    health = guarded.client.get("/health").json()
    known = Health.model_validate(health, strict=True)
    assert known.model_dump(mode="json") == health


# The page at /docs


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=executable, args=args)
        yield launched
        launched.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, list[str]]]:
    """A page whose requests to other servers fail, and what went wrong on it: such a request, an
    error, or something that the content security policy forbids."""
    faults: list[str] = []
    server = url.partition("/docs")[0]
    with browser.new_context(**options) as context:
        context.set_default_timeout(20_000)

        def answer(route: Route) -> None:
            if route.request.url.startswith(server):
                route.continue_()
            else:
                faults.append(route.request.url)
                route.abort()

        context.route("**/*", answer)
        page = context.new_page()
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.locator(".opblock").first.wait_for()
        yield page, faults


def operation(page: Page, tag: str, name: str) -> Locator:
    """An operation, unfolded and with its form enabled."""
    block = page.locator(f"#operations-{tag}-{name}")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    return block


def executed(block: Locator, status: int) -> Locator:
    """The answer to the example of the page."""
    block.get_by_role("button", name="Execute").click()
    answer = block.locator("tr.response").first
    expect(answer.locator(".response-col_status")).to_have_text(str(status))
    return answer


def test_the_page_loads_nothing_from_other_servers_and_calls_with_a_key(
    guarded: LiveServer, browser: Browser
) -> None:
    with opened(browser, f"{guarded.url}/docs") as (page, faults):
        paths = guarded.client.get("/openapi.json").json()["paths"]
        expect(page.locator(".opblock")).to_have_count(sum(map(len, paths.values())))
        expect(page.locator("h1")).to_contain_text("Osiris LLM sidecar")
        proposing = operation(page, "generation", "propose_trade_adjustments")
        executed(proposing, 401)
        # A browser reports each error answer.
        assert [fault for fault in faults if "401" not in fault] == []
        faults.clear()
        page.get_by_role("button", name="Authorize", exact=True).click()
        page.locator("#auth-bearer-value").fill(KEY)
        page.get_by_role("button", name="Apply credentials").first.click()
        page.get_by_role("button", name="Close").first.click()
        expect(executed(proposing, 200)).to_contain_text("phi3_proposal")
        spoken = executed(operation(page, "speech", "speak"), 200)
        # The page plays the received sound: fetching it again would be a GET.
        expect(spoken.locator("audio source")).to_have_attribute("src", re.compile("^blob:"))
        kept = page.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie]")
        assert kept == [{}, {}, ""]
        page.reload()
        expect(page.locator(".authorize.unlocked")).to_be_visible()
        assert faults == []


@pytest.mark.own_process("a process shows the profiles of its own requests")
def test_the_profile_works_under_its_policy(guarded: LiveServer, browser: Browser) -> None:
    path = "/propose_trade_adjustments/"
    profile = f"/debug/prof?path={path}"

    def is_profiled() -> bool:
        if guarded.client.get(profile).is_success:
            return True
        # One request in ten seconds is profiled, which may have been an earlier one. A proposal
        # takes longer than the 10 ms between two samples.
        guarded.client.post(path, json={"prompt": PROMPT}).raise_for_status()
        return False

    guarded.wait_until(is_profiled, interval=0.3)
    faults: list[str] = []
    with browser.new_context(extra_http_headers={"X-API-Key": KEY}) as context:
        page = context.new_page()
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{guarded.url}{profile}")
        page.locator(".call-stack-view").first.wait_for()
        expect(page.locator("#model-calls")).to_have_css("padding-left", "16px")
    assert faults == []


OF_THE_VIEWER = {
    "color-contrast": "its badges and buttons have white or green text on light colours",
    "label": "its text field for a request's body has no label",
    "nested-interactive": "an operation's heading is a button that holds another one",
    "select-name": "its label for the list of servers does not name the list",
}
"""Rules of axe that Swagger UI violates seriously or critically, with the element."""


def test_the_page_is_accessible_except_the_viewer(guarded: LiveServer, browser: Browser) -> None:
    # The policy would block axe as well.
    with opened(browser, f"{guarded.url}/docs", bypass_csp=True) as (page, _):
        operation(page, "generation", "generate_phi3")
        found = Axe().run(page).response["violations"]
        serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
        ours = [
            target
            for rule in serious
            for node in rule["nodes"]
            for target in node["target"]
            if page.locator(".swagger-ui").locator(target).count() == 0
        ]
    assert {rule["id"] for rule in serious} == set(OF_THE_VIEWER)
    assert ours == []

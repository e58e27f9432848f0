"""The documentation's tables are current, and the names in it exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from llm_sidecar.db import Phi3FeedbackSchema
from llm_sidecar.models.base import ChoiceScores
from llm_sidecar.services.events import ADAPTER_SWAPPED, PAYLOADS
from llm_sidecar.services.proposal_run import AssessedProposal
from llm_sidecar.settings import Settings
from llm_sidecar.tts.voice import AUDIO_BYTES
from osiris.server import create_app
from tests.docs_pages import PAGES, anchors
from tests.docs_tables import COMMAND, DOCS, EVENTS, GENERATED, current
from tests.live_server import ROOT
from tests.unit.fakes import FakeSidecar, completion, last_of

SITE = re.search(r"^site_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
WIDTH = 100


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_table_is_current(name: str) -> None:
    page, _ = GENERATED[name]
    assert (DOCS / page).read_text() == current(name), f"run {COMMAND}"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_documentation_leads_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_alert_has_a_heading_to_which_it_links() -> None:
    assert SITE is not None
    headings = re.findall(r"^### (\w+)$", (DOCS / "operations.md").read_text(), re.MULTILINE)
    groups = yaml.safe_load((ROOT / "deploy/observability/alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    for rule in rules:
        assert rule["alert"] in headings
        link = f"{SITE[1]}operations/#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"] == link


def test_every_route_is_on_the_page_about_them() -> None:
    ours, openai = ((DOCS / page).read_text() for page in ("http-api.md", "openai.md"))
    paths = create_app(Settings.from_environ({"REDIS_URL": "memory://"})).openapi()["paths"]
    assert paths
    for path, methods in paths.items():
        text = openai if path.startswith("/v1/") else ours
        for method in methods:
            assert f"[{method.upper()} `{path.rstrip('/')}" in text


async def test_every_event_has_the_keys_that_its_row_says() -> None:
    proposal = {"ticker": "A", "action": "adjust", "side": "LONG", "confidence": 0.5}
    proposal |= {"new_stop_pct": 1.0, "new_target_pct": 2.0, "rationale": "So."}
    fake_sidecar = FakeSidecar()
    fake_sidecar.phi3.answers = [completion(json.dumps(proposal))]
    fake_sidecar.hermes.answers = [
        completion("Fine."),
        ChoiceScores({str(n): 0.1 for n in range(11)}),
    ]
    await last_of(
        fake_sidecar.sidecar.orchestrator.propose("Long A.", 256, None, fake_sidecar.attempt()),
        AssessedProposal,
    )
    await fake_sidecar.sidecar.feedback.submit(
        Phi3FeedbackSchema(transaction_id="t", feedback_type="rating", feedback_content="5"),
        None,
        fake_sidecar.attempt(),
    )
    published = {channel: set(payload) for channel, payload in fake_sidecar.happened.of("event")}
    # The author is left out of feedback without a named key, and no adapter is swapped here.
    assert published == {
        channel: payload.model_fields.keys() - {"author"}
        for channel, payload in PAYLOADS.items()
        if channel != ADAPTER_SWAPPED
    }
    assert EVENTS.keys() == {*PAYLOADS, AUDIO_BYTES}

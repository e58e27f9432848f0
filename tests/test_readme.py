"""The README's examples: each command is run, and gives an answer of the shape that it shows."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.demo.evaluate import numbers
from tests.live_server import ROOT, LiveServer, serve

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(
    r"<!-- example \w+ -->\n```bash\n([^`]*?)```\n+```(json|text)\n(.*?)```", README, re.DOTALL
)


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("demo")
    environ = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "ENABLE_METRICS": "true"}
    with serve(folder, **environ) as running:
        running.wait_until_ready()
        yield running


def shape(value: Any) -> Any:
    """The keys and types of a JSON value; a number is a number, and null may stand for anything."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, bool) or value is None:
        return "bool" if value is not None else None
    return "number" if isinstance(value, int | float) else type(value).__name__


def agree(shown: Any, found: Any) -> bool:
    if shown is None or found is None:
        return True
    if isinstance(shown, dict) and isinstance(found, dict):
        return shown.keys() == found.keys() and all(agree(shown[k], found[k]) for k in shown)
    return bool(shown == found)


def test_every_endpoint_of_this_version_has_an_example() -> None:
    assert len(EXAMPLES) == README.count("<!-- example ")
    commands = " ".join(command for command, _, _ in EXAMPLES)
    for path in (
        "/propose_trade_adjustments/",
        "/generate/",
        "/score/hermes/",
        "/feedback/phi3/",
        "/speak",
        "/stream/audio",
        "/adapters/swap",
        "/health",
        "/health/ready",
        "/metrics",
    ):
        assert f"localhost:8000{path}" in commands


@pytest.mark.parametrize(("command", "language", "shown"), EXAMPLES)
def test_an_example_answers_as_shown(
    demo_server: LiveServer, tmp_path: Path, command: str, language: str, shown: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", command.replace("localhost:8000", demo_server.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    if language == "text":
        assert done.stdout.strip() == shown.strip()
    else:
        assert agree(shape(json.loads(shown)), shape(json.loads(done.stdout))), done.stdout


def test_a_correction_puts_none_of_its_numbers_into_the_next_proposals(
    demo_server: LiveServer,
) -> None:
    def propose(prompt: str) -> tuple[dict[str, Any], str]:
        response = demo_server.client.post("/propose_trade_adjustments/", json={"prompt": prompt})
        return response.json(), response.headers["X-Prompt-Tokens"]

    prompts = re.findall(r'"prompt": "(.*?)"', README)
    assert len(prompts) > 2
    before = {prompt: propose(prompt) for prompt in prompts}
    corrected, _ = propose("Long MSFT from 402, RSI 83.5 and overbought.")
    demo_server.client.post(
        "/feedback/phi3/",
        json={
            "transaction_id": corrected["transaction_id"],
            "feedback_type": "correction",
            "feedback_content": "Too tight.",
            "corrected_proposal": corrected["phi3_proposal"] | {"new_stop_pct": 2.5},
        },
    ).raise_for_status()
    for prompt, (answer, tokens) in before.items():
        again, tokens_again = propose(prompt)
        assert again["phi3_proposal"] == answer["phi3_proposal"]
        assert tokens_again == tokens
        assert numbers(again["phi3_proposal"]["rationale"]) <= numbers(prompt)

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
    r"<!-- example (\w+) -->\n```bash\n([^`]*?)```\n+```(json|text)\n(.*?)```", README, re.DOTALL
)


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("demo")
    environ = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "ENABLE_METRICS": "true"}
    with serve(folder, **environ) as running:
        running.wait_until_ready()
        # The example of `/health` shows a mean score, whichever examples have run before it.
        running.client.post("/score/hermes/", json={"proposal": {"ticker": "AAPL"}})
        running.wait_until(
            lambda: running.client.get("/health").json()["num_hermes_scores_last_24h"]
        )
        yield running


NUMBER, TEXT = "a number", "a text"
VARIES = {
    *("transaction_id", "proposal_id", "feedback_id", "uri"),
    *("action", "rationale", "hermes_assessment", "generated_text"),
}
"""Texts that differ from run to run, or, written by a model, from processor to processor."""


def known(value: Any, key: str = "") -> Any:
    """What a run repeats of a JSON answer: all but the numbers and the texts under `VARIES`."""
    if isinstance(value, dict):
        return {name: known(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [known(item, key) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return NUMBER
    return TEXT if isinstance(value, str) and key in VARIES else value


def test_every_endpoint_of_this_version_has_an_example() -> None:
    assert len(EXAMPLES) == README.count("<!-- example ")
    commands = " ".join(command for _, command, _, _ in EXAMPLES)
    for path in (
        "/propose_trade_adjustments/",
        "/generate/",
        "/score/hermes/",
        "/feedback/phi3/",
        "/feedback/$id",
        "/examples/",
        "/speak",
        "/stream/audio",
        "/adapters/swap",
        "/health",
        "/health/ready",
        "/metrics",
    ):
        assert f"localhost:8000{path}" in commands


@pytest.mark.parametrize(
    ("command", "language", "shown"),
    [pytest.param(*example, id=name) for name, *example in EXAMPLES],
)
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
        assert known(json.loads(done.stdout)) == known(json.loads(shown))


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ({"a": None}, {"a": 1}),
        ({"a": 1}, {"a": None}),
        ({"a": 1}, {"a": "1"}),
        ({"a": 1}, {"a": True}),
        ({"a": True}, {"a": False}),
        ({"a": "ok"}, {"a": "error"}),
        ({"a": []}, {"a": ["repaired"]}),
        ({"a": 1}, {}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ({"rationale": "So."}, {"rationale": None}),
    ],
)
def test_an_answer_that_differs_from_the_one_shown_is_noticed(shown: Any, found: Any) -> None:
    assert known(shown) != known(found)


def test_numbers_and_texts_that_vary_are_no_difference() -> None:
    shown = {"rationale": "So.", "score": 1, "in": [{"score": 0.5}]}
    assert known(shown) == known({"rationale": "Or so.", "score": 2.5, "in": [{"score": 1}]})


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

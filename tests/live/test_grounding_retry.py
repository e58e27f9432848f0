"""A server that retries a proposal that is not grounded in its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from llm_sidecar.grounding import ungrounded_fields
from tests.live_server import LiveServer, serve
from tests.unit.test_grounding import proposal

PROMPTS: Final = [
    f"Long T{number}X from {100 + number}, now {112.5 + number}, RSI {60 + number}."
    for number in range(10)
]


@pytest.fixture(scope="module")
def retrying(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server of random weights, which alone say nothing that is in a prompt."""
    folder = tmp_path_factory.mktemp("retrying")
    environ = {"GROUNDING": "retry", "ENABLE_METRICS": "true", "FEW_SHOT_EXAMPLES": "3"}
    with serve(folder, **environ, **random_models) as running:
        running.wait_until_ready()
        yield running


def test_a_retried_proposal_has_the_tickers_and_numbers_of_its_prompt(
    retrying: LiveServer,
) -> None:
    for prompt in PROMPTS:
        response = retrying.client.post("/generate/phi3", json={"prompt": prompt})
        assert response.headers["X-Grounded"] == "true"
        assert ungrounded_fields(response.json(), prompt) == ()
    text = retrying.metrics()
    assert text.value("sidecar_ungrounded_proposals_total") == 0
    # Each of them was asked for twice.
    assert text.value("sidecar_request_success_total", model="phi3") == 2 * len(PROMPTS)


def test_a_correction_is_an_example_whatever_it_is_grounded_in(retrying: LiveServer) -> None:
    def ask() -> tuple[int, str]:
        response = retrying.client.post("/generate/phi3", json={"prompt": PROMPTS[0]})
        return int(response.headers["X-Prompt-Tokens"]), response.headers["X-Grounded"]

    response = retrying.client.post("/propose_trade_adjustments", json={"prompt": PROMPTS[0]})
    before, _ = ask()
    corrected = proposal("OTHER", "The 4711 of another day.")
    correction = {
        "transaction_id": response.json()["transaction_id"],
        "feedback_type": "correction",
        "feedback_content": "Look at it as I do.",
        "corrected_proposal": corrected,
    }
    answer = retrying.client.post("/feedback/phi3", json=correction).json()
    assert answer["message"].endswith("is an example for the next ones.")
    # Another sidecar learns of it within two seconds.
    retrying.wait_until(lambda: all(ask()[0] > before + 20 for _ in retrying.sidecars), 5)
    _, grounded = ask()
    assert grounded == "true"

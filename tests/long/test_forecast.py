"""Whether a request takes as long as the forecast in `/health`, on a real language model."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from llm_sidecar.services.forecast import CONTEXT_TOKENS
from tests.live_server import serve
from tests.real_weights import smollm2_gguf

MARGIN = 1.3
SENTENCE = "AAPL trades at 191.{:02}, its RSI is 78, and its volume is 3% above the average. "
"""About 28 tokens."""


def test_a_proposal_takes_no_longer_than_its_forecast(tmp_path: Path) -> None:
    weights = str(smollm2_gguf())
    with serve(
        tmp_path,
        MICRO_LLM_MODEL_PATH=weights,
        HERMES_MODEL_PATH=weights,
        PRELOAD_MODELS="true",
        REQUEST_TIMEOUT_SECONDS="600",
    ) as server:
        server.client.timeout = 600.0
        server.wait_until_ready()
        forecast = server.client.get("/health").json()["forecast"]
        parts = [forecast[f"{part}_seconds"] for part in ("proposal", "critique", "score")]
        taken = []
        for number in range(5):
            lines = range(10 * number, 10 * number + CONTEXT_TOKENS // 28)
            began = time.perf_counter()
            body = {"prompt": "Long AAPL from 182.40. " + "".join(map(SENTENCE.format, lines))}
            server.client.post("/propose_trade_adjustments/", json=body).raise_for_status()
            taken.append(time.perf_counter() - began)
    print(f"foretold {sum(parts):.2f} s, taken {', '.join(f'{each:.2f}' for each in taken)} s")
    assert statistics.median(taken) <= MARGIN * sum(parts)

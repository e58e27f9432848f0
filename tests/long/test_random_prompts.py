"""Random prompts, hostile and allowed, to each model on each runtime.

Half are drawn from all of Unicode and are up to a tenth longer than a prompt may be. Half are of
allowed characters and short enough for the context, so that most of them are answered.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import psutil
import pytest

from llm_sidecar.demo import HERMES_FOLDER, PHI3_FOLDER
from tests.live_server import LiveServer, serve

HALF: Final = 250
MOST_CHARACTERS: Final = 32_768
"""MAX_PROMPT_CHARS where it is not set."""
FITTING_BYTES: Final = 6_000
"""A byte-level tokenizer makes at most one token of a byte; the rest is for the chat around it."""
PROPOSALS: Final = 21
PROMPT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 and overbought."

MODELS: Final = {
    "phi3 on onnxruntime": ("phi3", "demo", "demo"),
    "phi3 on transformers": ("phi3", "random_phi3_torch", "demo"),
    "hermes on transformers": ("hermes", "demo", "demo"),
    "hermes on onnxruntime": ("hermes", "demo", "random_hermes_onnx"),
}


@pytest.fixture(params=MODELS)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, LiveServer]]:
    """A model and a server that runs it on a runtime."""
    name, phi3, hermes = MODELS[request.param]
    demo = {"phi3": PHI3_FOLDER, "hermes": HERMES_FOLDER}
    folders = {
        model: demo[model] if which == "demo" else request.getfixturevalue(which)
        for model, which in (("phi3", phi3), ("hermes", hermes))
    }
    environ = {
        "MICRO_LLM_MODEL_PATH": str(folders["phi3"]),
        "HERMES_MODEL_PATH": str(folders["hermes"]),
        "PRELOAD_MODELS": "true",
    }
    with serve(tmp_path, **environ) as server:
        server.wait_until_ready()
        expected = request.param.partition(" on ")[2]
        assert server.client.get("/health").json()["models"][name]["runtime"] == expected
        yield name, server


def proposal_seconds(server: LiveServer) -> float:
    """Processor seconds of a proposal, in the cheapest of three turns.

    Not wall seconds: other work on the machine would count.
    """
    workers = [psutil.Process(server.worker("phi3")), psutil.Process(server.process.pid)]
    turns = []
    for _ in range(3):
        began = sum(map(processor_seconds, workers))
        for _ in range(PROPOSALS):
            answer = server.client.post("/generate/phi3/", json={"prompt": PROMPT})
            assert answer.status_code == 200
        turns.append(sum(map(processor_seconds, workers)) - began)
    return min(turns) / PROPOSALS


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def any_text(rng: Random) -> str:
    """Any code points, half surrogates and control characters among them, evenly or of one kind."""
    length = int(MOST_CHARACTERS ** rng.uniform(0.0, 1.01))
    first = rng.randrange(0x110000)
    last = min(0x10FFFF, first + rng.choice((0, 1, 40, 5_000, 0x110000)))
    return "".join(chr(rng.randint(first, last)) for _ in range(max(1, length)))


def fitting_text(rng: Random) -> str:
    """Allowed characters of one script or of all, in as many bytes as fit the context."""
    budget = int(FITTING_BYTES ** rng.uniform(0.2, 1.0))
    first, last = rng.choice(((0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x5FF), (0x4E00, 0x9FFF),
                              (0x1F300, 0x1FAFF), (0x20, 0x10FFFF)))  # fmt: skip
    text = "Long ABC. "
    while len(text.encode()) < budget:
        character = chr(rng.randint(first, last))
        if unicodedata.category(character) not in ("Cc", "Cs"):
            text += character
    return text


def test_random_prompts_end_no_worker(asked: tuple[str, LiveServer]) -> None:
    name, server = asked
    rng = Random(21)
    path = f"/generate/{name}/"
    before = proposal_seconds(server)
    answers: Counter[tuple[str, int]] = Counter()
    for kind, draw in (("any", any_text), ("fitting", fitting_text)):
        for _ in range(HALF):
            body: dict[str, Any] = {"prompt": draw(rng)}
            if name == "hermes":
                body["max_length"] = 16
            # json.dumps writes half surrogates as escapes, which a client may send.
            answer = server.client.post(
                path, content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
            answers[kind, answer.status_code] += 1
    after = proposal_seconds(server)
    models = server.client.get("/health").json()["models"]
    print(f"{name}: {dict(answers)}, a proposal {before:.4f} s before, {after:.4f} s after")
    assert {status for _, status in answers} == {200, 422}
    assert answers["fitting", 200] >= 200
    assert {model: state["restarts"] for model, state in models.items()} == {"phi3": 0, "hermes": 0}
    assert after <= 1.2 * before

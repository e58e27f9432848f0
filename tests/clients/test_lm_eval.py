"""lm-evaluation-harness asks the sidecar for the log likelihoods of SmolLM2.

They equal those that the engine computes itself, in another process, from the same tokens.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from tests.clients.sidecar import KEY, PYTHON, demo_sidecar
from tests.live_server import ROOT, LiveServer

PAIRS: Final = [
    *(("The capital of France is", " Paris."), ("The capital of France is", " a cheese.")),
    *(("Long NVDA at 182.40, RSI 58.", " The trend is up."), ("One, two, three,", " four, five")),
    *(("Sell when the", " price falls below the stop."), ("Ünïcödé — 東京 is in", " Japan 🗾.")),
    ("A stop loss is an order that", " closes a position once the price has moved against it."),
]
MODELS: Final = {"torch": "tests.real_transformers", "llama.cpp": "tests.real_weights"}


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    """A folder with the tokenizer of SmolLM2."""
    return path_of("tests.real_transformers")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Path:
    return path_of(MODELS[request.param])


@pytest.fixture(scope="module")
def smollm2(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("smollm2")
    with demo_sidecar(folder, HERMES_MODEL_PATH=str(model), HERMES_DTYPE="float32") as running:
        yield running


def path_of(module: str) -> Path:
    """The output of a test module that needs the packages of the sidecar."""
    return Path(in_sidecars_environment(module).strip())


def in_sidecars_environment(module: str, *arguments: str, given: str = "") -> str:
    command = [str(PYTHON), "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, input=given, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def harness(server: LiveServer, tokenizer: Path, **fields: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="hermes",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        header={"Authorization": f"Bearer {KEY}"},
        max_retries=1,
        **fields,
    )


def likelihoods(asked: LocalCompletionsAPI) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    found: list[tuple[float, bool]] = asked.loglikelihood(requests, disable_tqdm=True)
    return found


def test_log_likelihoods_equal_the_engines_own(
    smollm2: LiveServer, model: Path, tokenizer: Path
) -> None:
    asked = harness(smollm2, tokenizer)
    encoded = [asked._encode_pair(*pair) for pair in PAIRS]
    continuations = [[[*prompt, *rest], len(prompt)] for prompt, rest in encoded]
    own = json.loads(
        in_sidecars_environment(
            "tests.clients.own_likelihoods", str(model), given=json.dumps(continuations)
        )
    )
    expected: Any = [(pytest.approx(total, abs=1e-4), is_greedy) for total, is_greedy in own]
    assert likelihoods(asked) == expected
    assert likelihoods(harness(smollm2, tokenizer, tokenized_requests=False)) == expected
    if model.is_dir():
        # llama.cpp uses other kernels for several rows than for one.
        assert likelihoods(harness(smollm2, tokenizer, batch_size=4)) == expected


def test_the_likelier_continuation_is_the_right_one(smollm2: LiveServer, tokenizer: Path) -> None:
    right, wrong, *_ = likelihoods(harness(smollm2, tokenizer))
    assert right[0] > wrong[0]

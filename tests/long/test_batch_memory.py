"""Memory of batches on plain onnxruntime: it returns to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_sidecar.engines import GenerationRequest, load_engine
from llm_sidecar.engines.base import Batch, Message, unless_failed
from tests.live_server import ROOT
from tests.random_models import convert_to_onnx, write_transformers_folder

SYSTEM = Message(role="system", content="You are Hermes, the risk officer of a trading desk.")
LONG = "Long ABC. " * 425


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention states take 32 KB a token, so that they outweigh all else."""
    source = write_transformers_folder(
        tmp_path_factory.mktemp("wide-torch"), architecture="llama", head_dim=512
    )
    return convert_to_onnx(source, tmp_path_factory.mktemp("wide-onnx"))


def request(text: str) -> GenerationRequest:
    return GenerationRequest([SYSTEM, Message(role="user", content=text)], 16)


def run(batch: Batch, requests: list[GenerationRequest]) -> int:
    """Answers all at once; returns the prompt tokens of the first."""
    for number, one in enumerate(requests):
        batch.add(number, one)
    prompt_tokens = {}
    while batch:
        for number, result in batch.step():
            prompt_tokens[number] = unless_failed(result).prompt_tokens
    return prompt_tokens[0]


def anonymous_memory() -> float:
    """MB of this process, without file-backed pages such as those of the weights."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) / 1024


def measure(folder: Path) -> dict[str, float]:
    """MB that eight short prompts need before and after a long one, each alone or among them."""
    engine = load_engine(folder, device="cpu")
    batch = engine.batch()
    loaded = anonymous_memory()
    short = [request(f"Prompt {number}: what now?") for number in range(8)]
    found = {}
    run(batch, short)
    found["before"] = anonymous_memory() - loaded
    found["long prompt"] = run(batch, [request(LONG)])
    run(batch, short)
    found["after a long one"] = anonymous_memory() - loaded
    run(batch, [request(LONG), *short[:7]])
    run(batch, short)
    found["after a long one among others"] = anonymous_memory() - loaded
    return found


def test_eight_short_questions_need_no_more_memory_after_a_long_one(wide_model: Path) -> None:
    call = f"measure(pathlib.Path({str(wide_model)!r}))"
    code = f"import json, pathlib; from {__name__} import measure; print(json.dumps({call}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    assert found["long prompt"] >= 3000
    assert found["after a long one"] <= 1.2 * found["before"], found
    assert found["after a long one among others"] <= 1.2 * found["before"], found

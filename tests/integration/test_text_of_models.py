"""Workers whose engine writes control characters, or quotes a prompt in an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from llm_sidecar import proposals
from llm_sidecar.engines import EngineOptions, GenerationRequest
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.text import find_fault
from tests.completions import complete

MARK: Final = "ZXQMARK"
ODD_ENGINE: Final = """
import dataclasses
import llm_sidecar.engines as engines

load_engine = engines.load_engine

class Odd:
    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def prefill(self, request):
        raise RuntimeError(f"cannot read {request}")

    def batch(self):
        batch = self._engine.batch()

        class OddBatch(type(batch)):
            def step(self):
                return [
                    (number, dataclasses.replace(delta, text=delta.text + "\\0\\x1b\\x85"))
                    for number, delta in super().step()
                ]

        batch.__class__ = OddBatch
        return batch

engines.load_engine = lambda *args, **options: Odd(load_engine(*args, **options))
"""
"""Python imports `sitecustomize` when it starts, in a worker as well."""


@pytest.fixture
async def model(
    random_phi3_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LocalModel]:
    """A model with that engine, and a prefix that quotes the mark."""
    (tmp_path / "sitecustomize.py").write_text(ODD_ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = LocalModel(
        "phi3",
        lambda: ModelFiles("phi3/random", random_phi3_onnx),
        options=EngineOptions("cpu"),
        limits=ModelLimits(load_wait=60.0),
    )
    await made.prefill(proposals.prefix([proposals.Example(MARK, {"ticker": MARK})], 0.0))
    yield made
    await made.close()


async def test_a_completion_is_text_and_a_prefix_that_fails_costs_no_model(
    model: LocalModel, capfd: pytest.CaptureFixture[str]
) -> None:
    messages = proposals.build_messages("Long ABC")
    completion = await complete(model, GenerationRequest(messages, 256, proposals.GUIDANCE))
    assert "\ufffd\ufffd\ufffd" in completion.text
    assert find_fault(completion.text) is None
    said = capfd.readouterr().err
    assert "a prefix could not be prefilled: RuntimeError" in said
    assert MARK not in said
    assert MARK not in str(model.status())

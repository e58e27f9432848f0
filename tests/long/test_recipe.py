"""The whole recipe, on a few tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llm_sidecar.demo import evaluate
from llm_sidecar.engines import load_engine
from llm_sidecar.models.files import DEMO_DIR
from tests.live_server import ROOT


def test_the_recipe_makes_folders_that_an_engine_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.demo_models"]
    command += ["--scale", "0.0005", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name in ("phi3", "hermes"):
        assert f"{name}: step" in done.stderr
        engine = load_engine(tmp_path / name, device="cpu")
        assert engine.context_length == 8192
        assert evaluate.propose(engine, "Long ABC, rsi 78")["rationale"]
        tokenizer = (tmp_path / name / "tokenizer.json").read_bytes()
        assert tokenizer == (DEMO_DIR / name / "tokenizer.json").read_bytes()
    for file in (evaluate.PROPOSALS, evaluate.SCORES):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_two_processes_train_a_model_that_differs_from_the_shipped_one_in_weights_only(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "training.demo_models", "--only", "hermes"]
    command += ["--scale", "0.0001", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "hermes: step 1, " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hermes"]
    written, shipped = tmp_path / "hermes", DEMO_DIR / "hermes"
    names = {path.name for path in written.iterdir()}
    assert names == {path.name for path in shipped.iterdir()}
    differing = {n for n in names if (written / n).read_bytes() != (shipped / n).read_bytes()}
    assert differing == {"model.safetensors"}
    assert load_engine(written, device="cpu").context_length == 8192

"""Stored proposals, generated again by `python -m llm_sidecar.db replay`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_sidecar.db import ProposalSchema, Store, cli_main
from llm_sidecar.models.files import DEMO_DIR
from tests.in_process import in_process
from tests.live_server import ROOT
from tests.random_models import write_onnx_adapter
from tests.replays import DEMO, correct, propose, replayed, stored


def use(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_proposals_of_a_batch_are_the_same_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo models sample proposals with an example in the prompt."""
    use(monkeypatch, DEMO | {"LANCEDB_URI": str(tmp_path / "lancedb"), "PHI3_TEMPERATURE": "0.8"})
    names = asyncio.run(stored(tmp_path, 8, PHI3_TEMPERATURE="0.8"))
    reports = asyncio.run(replayed(names))
    assert [list(report.results) for report in reports] == [["proposal", "critique", "score"]] * 8
    assert [report.differences for report in reports] == [[]] * 8
    assert [report.same for report in reports] == [True] * 8


# With models of random weights, which load quickly


KEY = "0123456789abcdef"


class Made(NamedTuple):
    """A proposal that a sidecar has stored.

    Attributes:
        name: its transaction_id.
        environ: of the sidecar.
        phi3, adapters: folders of the model and of its adapters; 20260101 was in use.
        example: the feedback_id of the example in its prompt.
        beside: exit status and output of a replay while the sidecar ran.
        models: the sidecar's models in `/health` before and after this replay.
    """

    name: str
    environ: dict[str, str]
    phi3: Path
    adapters: Path
    example: str
    beside: tuple[int | None, str]
    models: tuple[Any, Any]


@pytest.fixture(scope="module")
def original(
    random_phi3_onnx: Path, random_hermes_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("replay")
    phi3 = shutil.copytree(random_phi3_onnx, folder / "phi3")
    adapters = folder / "adapters"
    write_onnx_adapter(phi3, adapters / "20260101")
    environ = {
        "MICRO_LLM_MODEL_PATH": str(phi3),
        "HERMES_MODEL_PATH": str(random_hermes_onnx),
        "PHI3_ADAPTER_DIR": str(adapters),
        "LANCEDB_URI": str(folder / "lancedb"),
        "PHI3_TEMPERATURE": "0.7",
        "HERMES_TEMPERATURE": "0.7",
        # Random weights generate a ticker that the prompt does not contain.
        "GROUNDING": "retry",
        "SIDECAR_API_KEYS": f"desk={KEY}",
    }

    async def make() -> tuple[Any, ...]:
        async with in_process(folder, **environ) as client:
            client.headers["X-API-Key"] = KEY
            assert (await client.post("/adapters/swap")).status_code == 200
            example = await correct(client, await propose(client, "Long ABC from 100, now 112."))
            name = await propose(client, "Short QX from 30, now 28. RSI 25.")
            # What happens later must not change a replay.
            write_onnx_adapter(phi3, adapters / "20260102", seed=2)
            assert (await client.post("/adapters/swap")).status_code == 200
            await correct(client, name)
            assert (await client.delete(f"/feedback/{example}")).status_code == 200
            before = (await client.get("/health")).json()["models"]
            beside = await run_command(name, environ)
            after = (await client.get("/health")).json()["models"]
            return name, example, beside, (before, after)

    with pytest.MonkeyPatch.context() as patch:
        # The same texts in every run, so that other weights surely write others.
        for module in ("propose", "score"):
            patch.setattr(f"llm_sidecar.services.{module}.new_seed", lambda temperature: 7)
        name, *others = asyncio.run(make())
    return Made(name, environ, phi3, adapters, *others)


async def run_command(name: str, environ: dict[str, str]) -> tuple[int | None, str]:
    """Exit status and output of the command in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llm_sidecar.db", "replay", name),
        cwd=ROOT,
        env=os.environ | environ,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


@pytest.fixture
def made(original: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A copy that a test may change; the environment is that of its sidecar."""
    folder = shutil.copytree(original.phi3.parent, tmp_path / "replay")
    environ = {
        name: value.replace(str(original.phi3.parent), str(folder))
        for name, value in original.environ.items()
    }
    use(monkeypatch, environ)
    return original._replace(environ=environ, phi3=folder / "phi3", adapters=folder / "adapters")


class Replayed(NamedTuple):
    """The exit status of the command, its JSON, and the differences by fact."""

    status: int
    found: dict[str, Any]
    differences: dict[str, tuple[str | None, str | None]]


@pytest.fixture
def replay(made: Made, capsys: pytest.CaptureFixture[str]) -> Any:
    def run() -> Replayed:
        status = cli_main(["replay", made.name, "--json"])
        out, err = capsys.readouterr()
        assert err == ""
        found = json.loads(out)
        assert found["transaction_id"] == made.name
        differences = {each["fact"]: (each["then"], each["now"]) for each in found["differences"]}
        return Replayed(status, found, differences)

    return run


def test_the_provenance_is_stored(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(["query-runs", "--table", "proposals", "--last", "0", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (found,) = [row["provenance"] for row in rows if row["transaction_id"] == made.name]
    assert (found["api_key"], found["examples"]) == ("desk", [made.example])
    proposal, critique = found["proposal"], found["critique"]
    assert (proposal["adapter"], critique["adapter"]) == ("20260101", None)
    assert proposal["guidance"]["kind"] == "grounded"
    assert proposal["seed"] is not None
    for identity, adapted in ((proposal["identity"], True), (critique["identity"], False)):
        assert len(identity["model_files"]) == len(identity["tokenizer_files"]) == 64
        assert (identity["adapter_files"] is not None) is adapted
        assert (identity["runtime"], identity["device"]) == ("onnxruntime", "cpu")
        assert identity["versions"].keys() >= {"llguidance", "numpy", "onnxruntime", "tokenizers"}
        assert "torch" not in identity["versions"]


def test_a_newer_adapter_and_feedback_since_then_change_nothing(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_main(["replay", made.name]) == 0
    assert capsys.readouterr() == (
        "proposal: the same\ncritique: the same\nscore: the same\n"
        "Nothing that is recorded has changed.\n",
        "",
    )


def test_an_adapter_that_is_gone_is_named(made: Made, replay: Any) -> None:
    shutil.rmtree(made.adapters / "20260101")
    status, found, differences = replay()
    assert (status, found["same"], found["proposal"]["same"]) == (1, False, False)
    assert found["critique"]["same"]
    assert differences["phi3 adapter"] == ("20260101", None)
    assert sorted(differences) == ["phi3 adapter", "phi3 adapter files"]


def test_an_adapter_with_other_weights_is_named(made: Made, replay: Any) -> None:
    shutil.rmtree(made.adapters / "20260101")
    (made.adapters / "20260102").rename(made.adapters / "20260101")
    status, _, differences = replay()
    assert (status, list(differences)) == (1, ["phi3 adapter files"])


def test_another_model_is_named(made: Made, replay: Any) -> None:
    shutil.rmtree(made.phi3)
    shutil.copytree(DEMO_DIR / "phi3", made.phi3)
    shutil.rmtree(made.adapters)
    status, found, differences = replay()
    assert (status, found["proposal"]["same"], found["critique"]["same"]) == (1, False, True)
    assert sorted(differences) == [
        "phi3 adapter",
        "phi3 adapter files",
        "phi3 model files",
        "phi3 tokenizer files",
    ]


def test_what_differs_without_an_effect_is_named_too(
    made: Made, replay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made.phi3 / "genai_config.json"
    config.write_text(config.read_text() + "\n")
    monkeypatch.setenv("HERMES_THREADS", "3")
    monkeypatch.setenv("PHI3_TEMPERATURE", "0")
    status, found, differences = replay()
    assert (status, found["same"]) == (0, True)
    assert list(differences) == ["phi3 model files", "phi3 temperature", "hermes threads"]
    assert differences["phi3 temperature"] == ("0.7", "0.0")


def test_it_runs_beside_a_sidecar_and_leaves_it_alone(original: Made) -> None:
    status, out = original.beside
    assert (status, out.splitlines()[:2]) == (0, ["proposal: the same", "critique: the same"])
    before, after = original.models
    assert before == after


def test_an_unknown_proposal_and_one_of_an_older_version_cannot_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "lancedb"))
    old = ProposalSchema(transaction_id="old", prompt="Long ABC.", proposal={}, model="phi3/demo")

    async def store() -> None:
        opened = await Store.open(tmp_path / "lancedb")
        await opened.append(old)
        await opened.close()

    asyncio.run(store())
    assert cli_main(["replay", str(uuid.uuid4())]) == 1
    assert capsys.readouterr().err == "No proposal with this transaction_id is stored.\n"
    assert cli_main(["replay", "old"]) == 1
    assert capsys.readouterr().err == (
        "The proposal cannot be replayed: the version of the sidecar that stored it did not "
        "record its provenance.\n"
    )
    assert cli_main(["replay"]) == 2

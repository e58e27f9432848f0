"""The commands in README.md and docs/: each one runs, and answers as the page shows.

The blocks of a page run one after the other in one shell, as a reader runs them, against one server
with the demo models.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.demo.evaluate import numbers
from tests.docs_pages import PAGES, Block, blocks, is_run
from tests.live_server import ROOT, LiveServer, serve


@pytest.fixture(scope="module")
def files_before() -> set[Path]:
    """The files of the project before the server starts."""
    return files_of_the_project()


def files_of_the_project() -> set[Path]:
    """All files but Python's and the tools' caches."""
    hidden = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
    return {path for path in ROOT.rglob("*") if not hidden & set(path.parts)}


@pytest.fixture(scope="module")
def demo_server(
    files_before: set[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with the demo models, which run on both runtimes, the voice of `make serve`, and
    empty folders as its HOME and TMPDIR."""
    folder = tmp_path_factory.mktemp("demo")
    environ = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "ENABLE_METRICS": "true"}
    environ["TTS_VOICE"] = "auto"
    for variable in ("HOME", "TMPDIR"):
        environ[variable] = str(folder / variable)
        (folder / variable).mkdir()
    with serve(folder, **environ) as running:
        running.wait_until_ready()
        # The example of `/health` shows a mean score, whichever page has run before it.
        running.client.post("/score/hermes/", json={"proposal": PROPOSAL})
        running.wait_until(
            lambda: running.client.get("/health").json()["num_hermes_scores_last_24h"]
        )
        yield running


@pytest.fixture
def checkout(demo_server: LiveServer, tmp_path: Path) -> Path:
    """The working folder of a page's commands: a checkout with the server's data."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "llm_sidecar").symlink_to(ROOT / "llm_sidecar")
    (folder / ".data").symlink_to(demo_server.log.parent)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    return folder


ONE_SIDECAR = {
    "README.md": "reads the database on the local disk",
    "docs/data.md": "reads the database on the local disk",
    "docs/scaling.md": "reads the database on the local disk",
    "docs/operations.md": "looks at the journal of the process",
    "docs/http-api.md": "shows /health of a sidecar without Redis",
}
"""Pages whose answers are those of a single sidecar, with the reasons."""


def pages() -> Iterator[Any]:
    """The pages with commands that are run."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        if any(map(is_run, blocks(page))):
            reason = ONE_SIDECAR.get(name)
            yield pytest.param(
                page, id=name, marks=[pytest.mark.own_process(reason)] * bool(reason)
            )


@pytest.mark.parametrize("page", list(pages()))
def test_the_commands_of_a_page_answer_as_shown(
    demo_server: LiveServer, checkout: Path, page: Path
) -> None:
    check_answers([block for block in blocks(page) if is_run(block)], demo_server, checkout)


def check_answers(run: list[Block], demo_server: LiveServer, checkout: Path) -> None:
    """Runs blocks in one shell; each must succeed, and answer as its page shows."""
    files = checkout.parent
    script = "".join(
        f"{{\n{as_run(block, demo_server, files / f'{number}.py')}}} "
        f">{files}/{number}.out 2>{files}/{number}.err\necho $? >{files}/{number}.status\n"
        for number, block in enumerate(run)
    )
    # A generator of clients calls ruff.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # The generated client, which a reader installs.
    modules = f"{ROOT}:{files}/sidecar-client"
    environ = {"PATH": path, "HOME": str(files), "PYTHONPATH": modules}
    subprocess.run(["bash", "-c", script], cwd=checkout, env=environ, check=True)
    for number, block in enumerate(run):
        status, answer, errors = (
            (files / f"{number}.{kind}").read_text() for kind in ("status", "out", "err")
        )
        assert status == "0\n", f"{block.location} fails:\n{answer}{errors}"
        if block.shown is not None:
            language, shown = block.shown
            assert comparable(language, answer) == comparable(language, shown), block.location


def as_run(block: Block, server: LiveServer, python_file: Path) -> str:
    """The command on this server and machine; an error of HTTP becomes one of the command."""
    command = block.text.replace("localhost:8000", server.url.removeprefix("http://"))
    if block.language == "python":
        python_file.write_text(command)
        return f"{shlex.quote(sys.executable)} {python_file}\n"
    command = command.replace("curl -s ", "curl -s --fail-with-body ")
    command = re.sub(r"(?<=\s)/tmp/", f"{python_file.parent}/", command)
    return command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")


NUMBER, TEXT = "a number", "a text"
PROPOSAL = {
    "ticker": "AAPL",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.0,
    "new_target_pct": 6.0,
    "confidence": 0.7,
    "rationale": "RSI of 78 is overbought, so tighten the stop.",
}
"""One as the demo models write them, so that its score is reliable."""
VARIES = {
    *("transaction_id", "proposal_id", "feedback_id", "run_id", "timestamp"),
    *("uri", "version"),
    *("action", "rationale", "assessment", "hermes_assessment", "generated_text"),
}
"""Texts that differ from run to run, or, written by a model, from processor to processor."""


def comparable(language: str, answer: str) -> Any:
    """The repeatable content of a text answer: all but measured numbers (three decimals)."""
    if language == "json":
        return known(json.loads(answer))
    return re.sub(r"\d+\.\d{3}\b", NUMBER, answer.strip())


def known(value: Any, key: str = "") -> Any:
    """The repeatable content of a JSON answer: all but the numbers and the texts under `VARIES`."""
    if isinstance(value, dict):
        return {name: known(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [known(item, key) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return NUMBER
    return TEXT if isinstance(value, str) and key in VARIES else value


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

    texts = "".join(page.read_text() for page in PAGES)
    prompts = sorted(set(re.findall(r'"prompt": "(.*?)"', texts)))
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


def test_nothing_is_written_outside_the_configured_folders(
    demo_server: LiveServer, files_before: set[Path]
) -> None:
    """Looks at what all tests above have left."""
    folder = demo_server.log.parent
    assert list((folder / "HOME").iterdir()) == []
    assert list((folder / "TMPDIR").iterdir()) == []
    assert files_of_the_project() == files_before

"""The commands in README.md and docs/: each one is run, and answers as the page shows.

The blocks of a page run one after the other in one shell, as a reader runs them, against one server
with the demo models.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from llm_sidecar.demo.evaluate import numbers
from tests.docs_pages import COMMANDS, PAGES, Block, blocks
from tests.live_server import ROOT, LiveServer, serve

NOT_RUN: Final = {
    # the first line of the block: why it is not run
    "make serve   # sets up .venv, then serves http://127.0.0.1:8000": "a server that stays",
    "make serve": "a server that stays",
    "python -m osiris --host 127.0.0.1 --port 8000": "a server that stays",
    "SIDECAR_DEMO=true REDIS_URL=memory:// LANCEDB_URI=.data/lancedb \\": "a server that stays",
    "redis-cli -u redis://localhost:6379/0 psubscribe 'phi3.*'": "needs a Redis, waits for ever",
    "docker-compose up --build   # with a Redis and the demo models, on http://127.0.0.1:8000": (
        "needs Docker"
    ),
    "docker-compose up --build": "needs Docker",
    "PHI3_HOST_DIR=/srv/models/phi3 HERMES_HOST_DIR=/srv/models/hermes docker-compose \\": (
        "needs Docker"
    ),
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://otel-collector:4318 \\": "needs Docker",
    "docker-compose exec llm-sidecar python -m llm_sidecar.db stats": "needs Docker",
    "docker-compose stop llm-sidecar": "needs Docker",
    "docker-compose run --rm --no-deps -T llm-sidecar tar -C /app/lancedb_data -xf - < "
    "lancedb.tar": "needs Docker",
    "CHATTERBOX_HOST_DIR=/srv/models/chatterbox docker-compose --profile speech up --build": (
        "needs Docker"
    ),
    "SIDECAR_TAG=0.3.0 docker-compose build": "needs Docker",
    "python3.11 -m venv .venv-chatterbox": "downloads 6 GB",
    ".venv/bin/python -m llm_sidecar.loader adapter PEFT_DIR .data/adapters/20260102": (
        "needs a PEFT adapter"
    ),
    "pip install .": "installs into the environment of the tests; tests/long does it elsewhere",
    ".venv/bin/python -m tests.docs_tables": "writes into the checkout",
    "make test": "runs this test",
    "pip install -r requirements-tests.txt": "downloads",
    "make bench": "takes minutes",
    "make train": "takes an hour",
    ".venv/bin/python -m tests.mutants llm_sidecar.reward": "takes minutes",
}
"""Blocks that are not run. `check_without_running` checks each of their commands instead."""


def pages_with_commands() -> list[Path]:
    return [page for page in PAGES if any(is_run(block) for block in blocks(page))]


def is_run(block: Block) -> bool:
    return block.language in COMMANDS and first_line(block) not in NOT_RUN


def first_line(block: Block) -> str:
    return block.text.partition("\n")[0]


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("demo")
    environ = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "ENABLE_METRICS": "true"}
    with serve(folder, **environ) as running:
        running.wait_until_ready()
        # The example of `/health` shows a mean score, whichever page has run before it.
        running.client.post("/score/hermes/", json={"proposal": {"ticker": "AAPL"}})
        running.wait_until(
            lambda: running.client.get("/health").json()["num_hermes_scores_last_24h"]
        )
        yield running


@pytest.fixture
def checkout(demo_server: LiveServer, tmp_path: Path) -> Path:
    """What a page's commands find in their folder: a checkout, whose data are the server's."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "llm_sidecar").symlink_to(ROOT / "llm_sidecar")
    (folder / ".data").symlink_to(demo_server.log.parent)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages_with_commands()]
)
def test_the_commands_of_a_page_answer_as_shown(
    demo_server: LiveServer, checkout: Path, page: Path
) -> None:
    run = [block for block in blocks(page) if is_run(block)]
    files = checkout.parent
    script = "".join(
        f"{{\n{as_run(block, demo_server, files / f'{number}.py')}}} "
        f">{files}/{number}.out 2>{files}/{number}.err\necho $? >{files}/{number}.status\n"
        for number, block in enumerate(run)
    )
    environ = {"PATH": os.environ["PATH"], "HOME": str(files), "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", script], cwd=checkout, env=environ, check=True)
    for number, block in enumerate(run):
        status, answer, errors = (
            (files / f"{number}.{kind}").read_text() for kind in ("status", "out", "err")
        )
        assert status == "0\n", f"{block.place} fails:\n{answer}{errors}"
        if block.shown is not None:
            language, shown = block.shown
            assert comparable(language, answer) == comparable(language, shown), block.place


def as_run(block: Block, server: LiveServer, python_file: Path) -> str:
    """The command on this server and machine; an error of HTTP becomes one of the command."""
    command = block.text.replace("localhost:8000", server.url.removeprefix("http://"))
    if block.language == "python":
        python_file.write_text(command)
        return f"{shlex.quote(sys.executable)} {python_file}\n"
    command = command.replace("curl -s ", "curl -s --fail-with-body ")
    command = re.sub(r"(?<=\s)/tmp/", f"{python_file.parent}/", command)
    return command.replace(".venv/bin/python", shlex.quote(sys.executable))


NUMBER, TEXT = "a number", "a text"
VARIES = {
    *("transaction_id", "proposal_id", "feedback_id", "run_id", "timestamp", "uri"),
    *("action", "rationale", "assessment", "hermes_assessment", "generated_text"),
}
"""Texts that differ from run to run, or, written by a model, from processor to processor."""


def comparable(language: str, answer: str) -> Any:
    """What a run repeats of an answer: of text, all but measured numbers (three decimals)."""
    if language == "json":
        return known(json.loads(answer))
    return re.sub(r"\d+\.\d{3}\b", NUMBER, answer.strip())


def known(value: Any, key: str = "") -> Any:
    """What a run repeats of a JSON answer: all but the numbers and the texts under `VARIES`."""
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


# What is not run


def test_the_list_of_what_is_not_run_names_blocks_that_exist() -> None:
    assert set(NOT_RUN) <= {first_line(block) for block in all_blocks() if block.language == "bash"}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.place)
        for block in all_blocks()
        if block.language == "bash" and not is_run(block)
    ],
)
def test_a_command_that_is_not_run_exists(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for line in block.text.replace("\\\n", "").splitlines():
        check_without_running(line)


def check_without_running(line: str) -> None:
    """Asks the tool of a command what it would do, or looks for what the command names."""
    words = shlex.split(line.partition(">")[0].partition("<")[0], comments=True)
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    while words and (assigned := re.fullmatch(r"([A-Z0-9_]+)=(.*)", words[0])):
        environ[assigned[1]] = assigned[2]
        del words[0]
    match words:
        case []:
            pass
        case ["make", *targets]:
            run_quietly(["make", "-n", *targets], environ)
        case ["docker-compose", *_]:
            check_compose(words, environ)
        case [program, "-m", "venv", _] if "python" in program:
            pass
        case [program, "-m", module, *_] if "python" in program:
            assert importlib.util.find_spec(module), module
        case [program, "install", *what] if program.endswith("pip"):
            assert (ROOT / what[-1]).exists()
        case ["pytest", *files]:
            assert all((ROOT / file).is_file() for file in files)
        case ["redis-cli", *_]:
            pass
        case _:
            raise AssertionError(f"nothing here checks {line!r}")


COMPOSE_COMMANDS: Final = ("up", "build", "exec", "run", "stop", "start")


def check_compose(words: list[str], environ: dict[str, str]) -> None:
    """docker-compose reads its files with the command's options; the services are in them."""
    if shutil.which("docker-compose") is None:
        reason = "docker-compose is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    index = next(i for i, word in enumerate(words) if word in COMPOSE_COMMANDS)
    # An empty file in place of a developer's own .env.
    with tempfile.NamedTemporaryFile(suffix=".env") as empty:
        options = ["docker-compose", "--env-file", empty.name, *words[1:index]]
        config = yaml.safe_load(run_quietly([*options, "config"], environ))
    if words[index] in ("exec", "run", "stop", "start"):
        service = next(word for word in words[index + 1 :] if not word.startswith("-"))
        assert service in config["services"]


def run_quietly(command: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in all_blocks()])
def test_a_block_is_of_a_language_that_is_checked(block: Block) -> None:
    match block.language:
        case "json":
            json.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case "":
            # A picture.
            assert not re.search(r"^\s*(curl|make|python|docker)", block.text, re.MULTILINE)
        case language:
            # Prometheus reads the queries in test_observability.py.
            assert language in (*COMMANDS, "promql")


def test_every_command_of_a_page_has_an_answer_that_is_compared_or_none() -> None:
    """An answer that is not right below its command would be compared with nothing."""
    assert not [block.place for block in all_blocks() if block.language == "text"]


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

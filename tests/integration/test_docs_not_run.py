"""The commands in README.md and docs/ that no test runs: each exists, and its tool accepts it."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Final

import pytest
import yaml

from tests.docs_pages import COMMANDS, NOT_RUN, Block, all_blocks, first_line, is_run
from tests.live_server import ROOT


def test_the_list_of_what_is_not_run_names_blocks_that_exist() -> None:
    assert set(NOT_RUN) <= {first_line(block) for block in all_blocks() if block.language == "bash"}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.location)
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
        case [program, "-m", module, *_] if "python" in program:
            assert is_program(module), module
        case [program, "install", *what] if program.endswith("pip"):
            assert (ROOT / what[-1]).exists()
        case ["pytest", *files]:
            assert all((ROOT / file).is_file() for file in files)
        case ["redis-cli", *_]:
            pass
        case _:
            raise AssertionError(f"nothing here checks {line!r}")


def is_program(module: str) -> bool:
    """Whether `python -m module` runs something."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        return spec is not None
    return importlib.util.find_spec(f"{module}.__main__") is not None


COMPOSE_COMMANDS: Final = ("up", "build", "exec", "run", "stop", "start")


def check_compose(words: list[str], environ: dict[str, str]) -> None:
    """docker-compose reads its files with the command's options; the services are in them."""
    if shutil.which("docker-compose") is None:
        reason = "docker-compose is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    index = next(i for i, word in enumerate(words) if word in COMPOSE_COMMANDS)
    services = compose_services(tuple(words[1:index]), tuple(environ.items()))
    if words[index] in ("exec", "run", "stop", "start"):
        service = next(word for word in words[index + 1 :] if not word.startswith("-"))
        assert service in services


@functools.cache
def compose_services(options: Sequence[str], environ: Sequence[tuple[str, str]]) -> set[str]:
    """The services that docker-compose reads from its files with these options."""
    # An empty file in place of a developer's own .env.
    with tempfile.NamedTemporaryFile(suffix=".env") as empty:
        command = ["docker-compose", "--env-file", empty.name, *options, "config"]
        return set(yaml.safe_load(run_quietly(command, dict(environ)))["services"])


def run_quietly(command: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=block.location) for block in all_blocks()]
)
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
            # test_observability.py and test_redis_acl.py give these to Prometheus and Redis.
            assert language in (*COMMANDS, "promql", "acl")


def test_every_command_of_a_page_has_an_answer_that_is_compared_or_none() -> None:
    """An answer that is not right below its command would be compared with nothing."""
    assert not [block.location for block in all_blocks() if block.language == "text"]

"""The bare package in an environment of its own, as another service installs it.

pip takes what it needs from its own index, so CI runs this apart from the suite.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_llm_client import ScriptedServer, answer, running
from tests.integration.test_package import PINS, copy_package

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", "venv/bin/python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the environment; nothing of this repository is in it."""
    folder = tmp_path_factory.mktemp("bare")
    copy_package(folder / "source")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    run(*PIP, "install", "--quiet", "./source[client]", cwd=folder)
    return folder


def run(*command: str, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_brings_httpx_and_pydantic_and_no_other_requirement_of_the_server(folder: Path) -> None:
    listed = run(*PIP, "list", "--format=json", cwd=folder)
    names = {package["name"] for package in json.loads(listed)}
    assert names & {"osiris-llm-sidecar", *PINS} == {"osiris-llm-sidecar", "httpx", "pydantic"}


CLIENT = """
import asyncio
import sys
from osiris.llm_client import AsyncLLMClient, LLMClient

async def ask():
    async with AsyncLLMClient(sys.argv[1]) as client:
        return await client.generate("phi3", "p")

with LLMClient(sys.argv[1]) as client:
    print(client.generate("phi3", "p"), asyncio.run(ask()))
"""


def test_the_clients_ask_a_server(folder: Path) -> None:
    server = ScriptedServer()
    server.script = [answer(200, {"ticker": "ABC"})]
    with running(server):
        said = run("venv/bin/python", "-c", CLIENT, server.url, cwd=folder)
    assert said == "{'ticker': 'ABC'} {'ticker': 'ABC'}\n"
    assert [seen.path for seen in server.seen] == ["/generate/", "/generate/"]


TYPED = """
from osiris.llm_client import LLMClient
reveal_type(LLMClient().generate("phi3", "p"))
LLMClient().generate(1, "p")
"""


def test_type_checkers_read_its_types(folder: Path) -> None:
    (folder / "service.py").write_text(TYPED)
    python = str(folder / "venv/bin/python")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", "mypy", "--no-error-summary")
    checked = subprocess.run(
        [*mypy, "--python-executable", python, "service.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (checked.stdout + checked.stderr).splitlines() == [
        'service.py:3: note: Revealed type is "dict[str, Any]"',
        'service.py:4: error: Argument 1 to "generate" of "Endpoints" has incompatible type'
        ' "int"; expected "str"  [arg-type]',
    ]


def test_a_command_of_the_server_says_what_it_needs(folder: Path) -> None:
    done = subprocess.run(
        ["venv/bin/osiris-sidecar"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(" pip install 'osiris-llm-sidecar[server]'\n")

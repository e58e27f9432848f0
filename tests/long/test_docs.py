"""The commands of the documentation that take too long for the suite answer as the pages show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_pages import Block, all_blocks, first_line
from tests.live.test_docs import check_answers, checkout, demo_server, files_before
from tests.live_server import LiveServer

__all__ = ["checkout", "demo_server", "files_before"]

COMMANDS = (".venv/bin/python -m llm_sidecar.loader convert \\",)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.location)
        for block in all_blocks()
        if first_line(block) in COMMANDS
    ],
)
def test_a_command_answers_as_shown(
    block: Block,
    demo_server: LiveServer,
    checkout: Path,
) -> None:
    check_answers([block], demo_server, checkout)


def test_every_command_is_in_the_documentation() -> None:
    assert {*COMMANDS} <= {first_line(block) for block in all_blocks()}

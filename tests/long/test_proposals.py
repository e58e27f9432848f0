"""Random weights write valid proposals for a thousand prompts, and for a hundred on torch."""

from __future__ import annotations

import pytest

from llm_sidecar.engines import Engine
from tests.integration import test_proposals as suite

engine = suite.engine


@pytest.mark.parametrize("part", range(2, 10))
def test_random_weights_write_nothing_but_valid_proposals(engine: Engine, part: int) -> None:
    """`make test` runs parts 0 and 1."""
    suite.test_random_weights_write_nothing_but_valid_proposals(engine, part)

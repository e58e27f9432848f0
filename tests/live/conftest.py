"""Which tests of this folder run against which target.

@pytest.mark.own_process("reads the log")    # only against a single sidecar
@pytest.mark.not_on("ray", "lasts too long")
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from tests.live_server import TARGET

EXCLUDED: Final = pytest.StashKey[Counter[str]]()
"""How many tests are not run, by the reason."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out the tests that the target excludes."""
    reasons = {item: reason for item in items if (reason := _reason(item))}
    items[:] = [item for item in items if item not in reasons]
    config.hook.pytest_deselected(items=list(reasons))
    config.stash[EXCLUDED] = Counter(reasons.values())


def _reason(item: pytest.Item) -> str | None:
    """Why a test does not run against the target; None if it does."""
    if TARGET != "one" and (marker := item.get_closest_marker("own_process")):
        return f"own_process: {marker.args[0]}"
    for marker in item.iter_markers("not_on"):
        target, reason = marker.args
        if target == TARGET:
            return f"not_on: {reason}"
    return None


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Lists what was not run."""
    excluded = config.stash.get(EXCLUDED, Counter())
    if excluded:
        terminalreporter.section(f"not run against the target {TARGET}: {excluded.total()}")
        for reason, count in excluded.most_common():
            terminalreporter.write_line(f"{count:3} {reason}")

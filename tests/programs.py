"""Programs of the system that some tests run."""

from __future__ import annotations

import os
import shutil


def require_program(name: str) -> str:
    """The path of a program. Skips the test where it is missing; fails it in CI, which has to have
    it."""
    # Debian's servers are in a folder that only root has in its PATH.
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        # Benchmarks use this file, too, in an environment without pytest.
        import pytest

        reason = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found

"""Runs schemathesis, which sends a server what its OpenAPI document allows and what it forbids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

_COMMAND: Final = Path(sys.executable).parent / "schemathesis"
_OPTIONS: Final = Path(__file__).with_name("schemathesis.toml")


def find_faults(url: str, key: str, folder: Path, random_requests: int = 0) -> str:
    """The report of a run in which a check failed, or an empty text.

    Args:
        url: of the server.
        key: one of its API keys.
        folder: for what schemathesis writes.
        random_requests: at most that many of each operation and each kind, beside those that the
            document's examples and limits make.
    """
    phases = ["--phases", "examples,coverage"]
    if random_requests:
        phases = ["--max-examples", str(random_requests)]
    command = [
        *(str(_COMMAND), "--config-file", str(_OPTIONS), "run", f"{url}/openapi.json"),
        *("--header", f"Authorization: Bearer {key}", "--checks", "all"),
        *("--seed", "1", *phases, "--request-timeout", "20"),
        # Several workers at once crash in CPython 3.11: "AST constructor recursion depth mismatch".
        *("--workers", "1", "--no-color"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr

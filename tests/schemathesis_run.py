"""Runs schemathesis, which sends a server what its OpenAPI document allows and what it forbids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

_COMMAND: Final = Path(sys.executable).parent / "schemathesis"
_OPTIONS: Final = Path(__file__).with_name("schemathesis.toml")


def find_faults(
    url: str,
    key: str,
    folder: Path,
    random_requests: int = 0,
    document: Path | None = None,
    options: Path = _OPTIONS,
    checks: str = "all",
) -> str:
    """The report of a run in which a check failed, or an empty text.

    Args:
        url: of the server, or of the paths of `document`.
        key: one of its API keys.
        folder: for the files of schemathesis.
        random_requests: maximum number for each operation and each kind; 0 means the requests from
            the document's examples and limits instead.
        document: path of another OpenAPI document than the server's own.
        options: the file with the options of the checks.
        checks: their names, separated by commas.
    """
    phases = ["--phases", "examples,coverage"]
    if random_requests:
        phases = ["--phases", "fuzzing,stateful", "--max-examples", str(random_requests)]
    asked = [f"{url}/openapi.json"] if document is None else [str(document), "--url", url]
    command = [
        *(str(_COMMAND), "--config-file", str(options), "run", *asked),
        *("--header", f"Authorization: Bearer {key}", "--checks", checks),
        *("--seed", "1", *phases, "--request-timeout", "20"),
        # Several workers at once crash in CPython 3.11: "AST constructor recursion depth mismatch".
        *("--workers", "1", "--no-color"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr

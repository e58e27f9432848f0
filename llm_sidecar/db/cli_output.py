"""How the command line writes: tables on a terminal, JSON lines elsewhere, progress, files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from llm_sidecar.db.tables import one_line
from llm_sidecar.errors import SidecarError

_CELL: Final = 40
"""Characters of a value that a table on a terminal shows."""
_ERASE_LINE: Final = "\r\x1b[K"


def reason(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, SidecarError):
        return error.detail
    return f"The database cannot be used: {one_line(error)}"


def progress(text: str) -> None:
    """Shows how far long work is, on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{_ERASE_LINE}{text}")
        sys.stderr.flush()


def rows(found: list[dict[str, Any]], if_empty: str, *, as_json: bool) -> None:
    """Writes rows as a table to a terminal, as JSON lines elsewhere or where `as_json` says so."""
    _end_progress()
    as_json = as_json or not sys.stdout.isatty()
    if not found:
        # Not on standard output when piped, where every line is a row.
        (sys.stderr if as_json else sys.stdout).write(f"{if_empty}\n")
    elif as_json:
        for row in found:
            sys.stdout.write(json.dumps(row, default=lambda value: value.isoformat()) + "\n")
    else:
        _table(found)


def _end_progress() -> None:
    if sys.stderr.isatty():
        sys.stderr.write(_ERASE_LINE)


def _table(found: list[dict[str, Any]]) -> None:
    cells = [list(found[0]), *([_cell(value) for value in row.values()] for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value.isoformat() if hasattr(value, "isoformat") else str(value)
    # What people wrote must not steer the terminal.
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"


@contextlib.contextmanager
def file_or_stdout(path: Path | None) -> Iterator[Callable[[str], Any]]:
    """Gives what writes text: to standard output, or to a file that is there only once it is whole.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        yield sys.stdout.write
        return
    number, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

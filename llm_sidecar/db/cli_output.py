"""How the command line writes: tables on a terminal, JSON lines elsewhere, progress, files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from llm_sidecar.db.tables import one_line
from llm_sidecar.errors import SidecarError

_CELL: Final = 40
"""Characters of a value that a table on a terminal shows."""
_ERASE_LINE: Final = "\r\x1b[K"


class Unwritable(SidecarError):
    """The file that was asked for cannot be written."""


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


def line(text: str) -> None:
    """Writes a line to standard output."""
    _write_out(f"{text}\n")


def note(text: str) -> None:
    """Writes a line about the work, which is no part of what it gives."""
    _end_progress()
    sys.stderr.write(f"{text}\n")


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
        sys.stderr.flush()


def _write_out(text: str) -> None:
    _end_progress()
    sys.stdout.write(text)


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
        Unwritable: the file cannot be written; one of that name that was there is as it was.
    """
    if path is None:
        yield _write_out
        return
    with _said_of(path):
        target = path.resolve()
        # Nothing may take the place of a device or a pipe.
        direct = target.exists() and not target.is_file()
    if direct:
        with _opened(path, target, "w") as file:
            yield _writer(path, file)
        return
    whole = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with _opened(path, whole, "x") as file:
            yield _writer(path, file)
            with _said_of(path):
                file.flush()
                os.fsync(file.fileno())
        with _said_of(path):
            whole.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            whole.unlink()
        raise


@contextlib.contextmanager
def _opened(shown: Path, path: Path, mode: str) -> Iterator[IO[str]]:
    with _said_of(shown):
        file = path.open(mode, encoding="utf-8")
    try:
        yield file
    finally:
        with _said_of(shown):
            file.close()


def _writer(shown: Path, file: IO[str]) -> Callable[[str], Any]:
    def write(text: str) -> None:
        with _said_of(shown):
            file.write(text)

    return write


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror or error}") from None

"""How the command line writes: lines, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from llm_sidecar import command_line
from llm_sidecar.db.tables import one_line
from llm_sidecar.errors import SidecarError

Write = Callable[[str | bytes], None]


class Unwritable(SidecarError):
    """The file that was asked for cannot be written."""


def reason(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"The database cannot be used: {one_line(error)}"


def line(text: str) -> None:
    """Writes a line to standard output."""
    write_out(f"{text}\n")


def write_out(text: str | bytes) -> None:
    """Writes to standard output."""
    command_line.end_progress()
    if isinstance(text, bytes):
        command_line.write_bytes(text)
    else:
        sys.stdout.write(text)


@contextlib.contextmanager
def file_or_stdout(path: Path | None) -> Iterator[Write]:
    """Gives what writes: to standard output, or to a file that is there only once it is whole.

    Text goes into a file as UTF-8.

    Raises:
        Unwritable: the file cannot be written; one of that name that was there is as it was.
    """
    if path is None:
        yield write_out
        return
    with _said_of(path):
        target = path.resolve()
        # Nothing may take the place of a device or a pipe.
        direct = target.exists() and not target.is_file()
    if direct:
        with _opened(path, target, "wb") as file:
            yield _writer(path, file)
        return
    whole = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with _opened(path, whole, "xb") as file:
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
def _opened(shown: Path, path: Path, mode: str) -> Iterator[IO[bytes]]:
    with _said_of(shown):
        file: IO[bytes] = path.open(mode)
    try:
        yield file
    finally:
        with _said_of(shown):
            file.close()


def _writer(shown: Path, file: IO[bytes]) -> Write:
    def write(text: str | bytes) -> None:
        with _said_of(shown):
            file.write(text.encode() if isinstance(text, str) else text)

    return write


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror or error}") from None

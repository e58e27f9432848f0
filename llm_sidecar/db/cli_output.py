"""Output of the command line: lines, and files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from llm_sidecar import command_line
from llm_sidecar.db.lance import one_line
from llm_sidecar.errors import CommandFailed

Write = Callable[[str | bytes], None]


class Unwritable(CommandFailed):
    """The output file cannot be written."""


def reason(error: Exception) -> str:
    """A one-line message about the error."""
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
    """Yields a function that writes to standard output, or to a file that appears when complete.

    Text is written to a file as UTF-8.

    Raises:
        Unwritable: the file cannot be written; an existing file of that name is unchanged.
    """
    if path is None:
        yield write_out
        return
    with _named_error(path):
        target = path.resolve()
        # A device or a pipe is written to directly; it must not be replaced.
        direct = target.exists() and not target.is_file()
    if direct:
        with _opened(path, target, "wb") as file:
            yield _writer(path, file)
        return
    whole = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with _opened(path, whole, "xb") as file:
            yield _writer(path, file)
            with _named_error(path):
                file.flush()
                os.fsync(file.fileno())
        with _named_error(path):
            whole.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            whole.unlink()
        raise


@contextlib.contextmanager
def _opened(shown: Path, path: Path, mode: str) -> Iterator[IO[bytes]]:
    with _named_error(shown):
        file: IO[bytes] = path.open(mode)
    try:
        yield file
    finally:
        with _named_error(shown):
            file.close()


def _writer(shown: Path, file: IO[bytes]) -> Write:
    def write(text: str | bytes) -> None:
        with _named_error(shown):
            file.write(text.encode() if isinstance(text, str) else text)

    return write


@contextlib.contextmanager
def _named_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror or error}") from None

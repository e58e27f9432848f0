"""Shared code of the command lines: exit statuses, standard streams, Ctrl-C, errors.

    sys.exit(command_line.run(work))

The statuses are `OK`, `FAILED`, `USAGE` for bad arguments, and `INTERRUPTED`. If the reader of a
pipe closes it, the command ends silently with `OK`. An error is one line on standard error.

Importing this module needs only the standard library, because the speech worker runs in an
environment of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, cast

from llm_sidecar.errors import CommandFailed, SidecarError

if TYPE_CHECKING:
    from typer import Typer

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

_ERASE_LINE: Final = "\r\x1b[K"
_DUMB: Final = ("dumb", "unknown")
"""Values of TERM for a terminal that cannot erase a line."""

# Otherwise the interpreter looks for garbage among the objects of all modules when it ends, which
# takes up to half a second. The memory of the process is freed anyway.
atexit.register(gc.freeze)

Work = Callable[[], int | None]
Reason = Callable[[Exception], str]


class OutputFailed(CommandFailed):
    """Standard output cannot be written."""


class _PipeClosed(Exception):
    """The reader of standard output has closed the pipe."""


def run(work: Work, reason: Reason | None = None) -> int:
    """Runs the work of a command.

    Args:
        work: returns an exit status; None counts as `OK`.
        reason: one line for an exception that is neither a SidecarError nor an OSError; without it
            such an exception counts as a defect and is raised.

    Returns:
        The exit status.
    """
    _open_closed_streams()
    output = _Output(sys.stdout)
    # Stored data may contain characters that the terminal's encoding lacks.
    _reconfigure(sys.stdout, errors="backslashreplace")
    with contextlib.redirect_stdout(cast(IO[str], output)):
        status = _status(work, reason)
        try:
            output.flush()
        except _PipeClosed:
            _discard(sys.stdout)
        except OutputFailed as error:
            _discard(sys.stdout)
            if status == OK:
                say(error.detail)
                status = FAILED
    return status


def run_app(
    app: Typer, arguments: Sequence[str] | None, prog: str, reason: Reason | None = None
) -> int:
    """Runs a typer application, whose commands return an exit status or None.

    Args:
        arguments: default: those of this process.
        prog: the program's name in help and errors.
        reason: see `run`.

    Returns:
        The exit status.
    """

    def work() -> int | None:
        from typer.exceptions import TyperException
        from typer.main import get_command

        try:
            given = None if arguments is None else list(arguments)
            status = get_command(app).main(args=given, prog_name=prog, standalone_mode=False)
        except TyperException as error:
            say(f"{prog}: {cast(Any, error).format_message()}")
            return USAGE
        return cast(int | None, status)

    return run(work, reason)


def say(text: str) -> None:
    """Writes one line to standard error, if that is neither closed nor full."""
    end_progress()
    line = " ".join(text.split())
    _write_error("".join(char if char.isprintable() else repr(char)[1:-1] for char in line) + "\n")


def progress(text: str) -> None:
    """Shows the progress of long work, if standard error is a terminal."""
    if _shows_progress():
        _write_error(f"{_ERASE_LINE}{text}")


def end_progress() -> None:
    """Erases the progress line; call it before anything else is written."""
    if _shows_progress():
        _write_error(_ERASE_LINE)


def _shows_progress() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in _DUMB


def _write_error(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        # Otherwise the interpreter would flush again at exit, and change the status.
        _discard(sys.stderr)


def write_bytes(data: bytes) -> None:
    """Writes bytes to standard output.

    Raises:
        OutputFailed
    """
    sys.stdout.flush()
    with _of_standard_output():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def write_as_utf8() -> None:
    """Writes text to standard output as UTF-8 from now on, whatever the locale is."""
    sys.stdout.flush()
    _reconfigure(sys.stdout, encoding="utf-8")


def _status(work: Work, reason: Reason | None) -> int:
    try:
        return work() or OK
    except _PipeClosed:
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.code, str):
            # As the interpreter would write it.
            say(stop.code)
            return FAILED
        # argparse has written its message.
        return stop.code or OK
    except SidecarError as error:
        say(error.detail)
    except Exception as error:
        if reason is not None:
            say(reason(error))
        elif isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            say(f"{where}{error.strerror or error}")
        else:
            raise
    return FAILED


class _Output:
    """Standard output, with exceptions of its own for its failures."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _of_standard_output():
            return self._stream.write(text)

    def flush(self) -> None:
        with _of_standard_output():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _of_standard_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _PipeClosed from None
    except OSError as error:
        raise OutputFailed(f"standard output: {error.strerror or error}") from None


def _open_closed_streams() -> None:
    """Replaces standard streams that were closed before the start.

    Otherwise the next opened file would get the descriptor of the stream, and output for the stream
    would go into that file. Standard output is opened read-only, so that a write to it fails.
    """
    for name, flags, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            # The system assigns the lowest free descriptor, which is the stream's.
            descriptor = os.open(os.devnull, flags)
            # Processes that this one starts need it too.
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def _discard(stream: IO[str]) -> None:
    """Redirects a stream to the null device, so that its buffer is discarded."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _reconfigure(stream: IO[str], **options: str) -> None:
    # A replaced stream, for example in tests, may have no encoding.
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**options)

"""How every command line here ends: exit statuses, standard streams, Ctrl-C, errors.

    sys.exit(command_line.run(work))

The statuses are `OK`, `FAILED`, `USAGE` for bad arguments, and `INTERRUPTED`. A reader that closes
the pipe ends the command quietly with `OK`. An error is one line on standard error.

Importing this needs the standard library only, because the speech worker runs in an environment of
its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, cast

from llm_sidecar.errors import SidecarError

if TYPE_CHECKING:
    from typer import Typer

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

_ERASE_LINE: Final = "\r\x1b[K"
_DUMB: Final = ("dumb", "unknown")
"""Values of TERM for a terminal that cannot erase a line."""

Work = Callable[[], int | None]
Reason = Callable[[Exception], str]


class OutputFailed(SidecarError):
    """Standard output cannot be written."""


class _ReaderGone(Exception):
    """Whoever read standard output has closed it."""


def run(work: Work, reason: Reason | None = None) -> int:
    """Runs the work of a command.

    Args:
        work: returns an exit status; None counts as `OK`.
        reason: one line for an exception that is neither a SidecarError nor an OSError; without it
            such an exception is a defect and is raised.

    Returns:
        The exit status.
    """
    _open_closed_streams()
    output = _Output(sys.stdout)
    # Data from outside may hold characters that the terminal's encoding lacks.
    _reconfigure(sys.stdout, errors="backslashreplace")
    with contextlib.redirect_stdout(cast(IO[str], output)):
        status = _status(work, reason)
        try:
            output.flush()
        except _ReaderGone:
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
        arguments: this process's unless given.
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
    """Writes one line to standard error; nothing where that is closed or full."""
    end_progress()
    line = " ".join(text.split())
    _write_error("".join(char if char.isprintable() else repr(char)[1:-1] for char in line) + "\n")


def progress(text: str) -> None:
    """Shows how far long work is, if standard error is a terminal."""
    if _shows_progress():
        _write_error(f"{_ERASE_LINE}{text}")


def end_progress() -> None:
    """Erases the progress, before anything else is written."""
    if _shows_progress():
        _write_error(_ERASE_LINE)


def _shows_progress() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in _DUMB


def _write_error(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        # The interpreter must not try again at exit, which would change the status.
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
    except _ReaderGone:
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
    """Standard output, whose failures cannot be taken for those of anything else."""

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
        raise _ReaderGone from None
    except OSError as error:
        raise OutputFailed(f"standard output: {error.strerror or error}") from None


def _open_closed_streams() -> None:
    """Puts something in the place of standard streams that were closed before the start.

    Otherwise the next file that is opened gets the number of the stream, and what is meant for the
    stream goes into that file. Standard output is opened for reading, so that writing to it fails.
    """
    for name, flags, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            # The lowest free number, which is the stream's.
            descriptor = os.open(os.devnull, flags)
            # Processes that this one starts need it too.
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def _discard(stream: IO[str]) -> None:
    """Lets what is left in the buffer of a stream go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _reconfigure(stream: IO[str], **options: str) -> None:
    # A stream that a test or another program has put there need not have an encoding.
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**options)

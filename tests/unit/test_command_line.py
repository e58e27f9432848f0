"""The exit status of a command, and its output on each stream."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

import pytest

from llm_sidecar import command_line
from llm_sidecar.errors import SidecarError


class Failing(io.StringIO):
    """A stream that fails when it is flushed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("status", [None, 0, 1, 2])
def test_the_work_gives_the_status(status: int | None) -> None:
    assert command_line.run(lambda: status) == (status or 0)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SidecarError("It is broken."), 1, "It is broken.\n"),
        (OSError(errno.EACCES, "Permission denied", "/x"), 1, "/x: Permission denied\n"),
        (OSError(errno.EACCES, "Permission denied"), 1, "Permission denied\n"),
        (OSError("odd"), 1, "odd\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
        (SystemExit("It is why."), 1, "It is why.\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    assert command_line.run(raising(error)) == status
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", said)


def test_another_exception_is_a_defect_unless_there_is_a_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ZeroDivisionError):
        command_line.run(raising(ZeroDivisionError("x")))
    assert command_line.run(raising(ZeroDivisionError("x")), lambda error: f"It: {error}") == 1
    assert command_line.run(raising(OSError("y")), lambda error: f"It: {error}") == 1
    assert capsys.readouterr().err == "It: x\nIt: y\n"


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (errno.ENOSPC, 1, "standard output: No space left on device\n"),
        (errno.EBADF, 1, "standard output: Bad file descriptor\n"),
        (errno.EPIPE, 0, ""),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_an_unwritable_standard_output_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
    said: str,
    early: bool,
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(number))

    def work() -> None:
        sys.stdout.write("row\n")
        if early:
            sys.stdout.flush()

    assert command_line.run(work, lambda error: "It is the database.") == status
    assert capsys.readouterr().err == said


def test_a_failure_of_the_work_is_not_hidden_by_one_of_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    assert command_line.run(raising(SidecarError("It is broken."))) == 1
    assert command_line.run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "It is broken.\n"


def test_an_unwritable_standard_error_changes_no_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Failing(errno.ENOSPC))
    assert command_line.run(raising(SidecarError("It is broken."))) == 1
    assert command_line.run(lambda: command_line.say("A note.")) == 0


def test_a_character_that_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))

    def work() -> None:
        sys.stdout.write("é €")

    assert command_line.run(work) == 0
    assert raw.getvalue() == b"\xe9 \\u20ac"


def test_a_message_is_one_line_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command_line.say("two\nlines \x1b[31m of\u202e it")
    assert capsys.readouterr().err == "two lines \\x1b[31m of\\u202e it\n"


@pytest.mark.parametrize(("term", "shown"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_progress_is_for_terminals_that_can_erase_a_line(
    monkeypatch: pytest.MonkeyPatch, term: str, shown: bool
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", term)
    command_line.progress("half")
    command_line.say("done")
    erase = "\r\x1b[K" if shown else ""
    assert terminal.getvalue() == (f"{erase}half" if shown else "") + f"{erase}done\n"


def test_progress_is_not_written_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    command_line.progress("half")
    command_line.end_progress()
    assert capsys.readouterr().err == ""

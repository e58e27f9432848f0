"""Runs one step of a conversion in a process of its own, and measures its memory.

The runtimes are loaded only there, so their memory is free again after each step, and a step that
runs out of memory does not take the command with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

from llm_sidecar.models.conversion.errors import ConversionFailed
from llm_sidecar.models.local.out_of_memory import ended_first

_ENVIRON: Final = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    # Otherwise glibc keeps freed memory: its threshold for mappings grows with what is freed.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "2",
}


def run(
    what: str, arguments: Sequence[str], on_line: Callable[[str], None] = lambda line: None
) -> int:
    """Runs `python -m ARGUMENTS` without downloads from Hugging Face.

    Args:
        what: the step, for errors.
        arguments: a module, and its arguments.
        on_line: called with each line that the process writes.

    Returns:
        The most memory that the process had, in bytes.

    Raises:
        ConversionFailed: the process failed; has the last line of its output.
    """
    last_line = ""
    with ended_first():
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, **_ENVIRON},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last_line = line.strip() or last_line
                on_line(line)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == -signal.SIGKILL:
        raise ConversionFailed(
            f"{what} was killed, most likely because memory ran out; convert on a machine with "
            "more memory, or serve a GGUF of the model"
        )
    if process.returncode != 0:
        # The last line of a traceback says what is wrong.
        raise ConversionFailed(f"{what} failed: {last_line or 'without any output'}")
    # In bytes on macOS, in KiB on Linux: getrusage(2).
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP, which a closed terminal sends, raise SystemExit in this context, so
    that nothing is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        # `nohup` ignores SIGHUP.
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

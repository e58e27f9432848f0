"""The server's side of the process that runs Piper; a thread asks it and waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Final

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts.piper_messages import Failed, Loaded, Speak, Speech

_ROOT: Final = str(Path(__file__).resolve().parents[2])
_EXIT_GRACE: Final = 1.0
"""Seconds that a process takes to end after its socket is closed."""


class PiperProcess:
    """A process of its own: the server imports no runtime, and survives a crash of this one."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Starts the process; `wait` returns when it is loaded.

        Raises:
            OSError: no process can be started.
        """
        self._connection, theirs = Pipe()
        with theirs:
            self.process = _spawn(theirs.fileno(), folder, threads)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def wait(self, timeout: float) -> None:
        """Returns when the voice is loaded.

        Raises:
            VoiceUnavailable: it does not load; the process has ended.
        """
        answer = self._receive(timeout)
        if not isinstance(answer, Loaded):
            self.end()
            raise VoiceUnavailable(answer.reason if isinstance(answer, Failed) else "no answer")

    def ask(self, request: Speak, timeout: float) -> Speech:
        """Speaks a part of a text.

        Raises:
            VoiceUnavailable: the voice fails, or the process has ended or is killed because it
                takes longer than `timeout` seconds.
        """
        try:
            self._connection.send(request)
        except OSError:
            raise self._ended() from None
        answer = self._receive(timeout)
        if isinstance(answer, Speech):
            return answer
        raise VoiceUnavailable(
            answer.reason if isinstance(answer, Failed) else "no answer", retry_after=1
        )

    def end(self) -> None:
        """Kills the process, which holds nothing to save, and waits for its end."""
        self.process.kill()
        self.process.wait()

    def _receive(self, timeout: float) -> Loaded | Speech | Failed:
        try:
            if self._connection.poll(timeout):
                answer: Loaded | Speech | Failed = self._connection.recv()
                return answer
        except (EOFError, OSError):
            raise self._ended() from None
        self.end()
        raise VoiceUnavailable(
            f"The Piper voice did not answer within {timeout:.0f} s; try again.", retry_after=1
        )

    def _ended(self) -> VoiceUnavailable:
        try:
            self.process.wait(_EXIT_GRACE)
        except subprocess.TimeoutExpired:
            self.end()
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return VoiceUnavailable(f"The Piper process ended ({how}); try again.", retry_after=1)


def _spawn(socket: int, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "llm_sidecar.tts.piper_worker"),
            *(str(socket), str(folder), str(threads)),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=[socket],
        # Ctrl-C reaches the server only.
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )

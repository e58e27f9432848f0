"""A process as the owner of requests: others see whether it is still alive."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from pathlib import Path

from llm_sidecar.journal.locks import make_folder


class Owner:
    """Holds a lock on a file of its own until the process ends. Every method blocks on the disk.

    Attributes:
        id: of this owner.
    """

    def __init__(self, folder: Path) -> None:
        """Creates nothing yet.

        Args:
            folder: has one file for each owner.
        """
        self.id = uuid.uuid4().hex
        self._folder = folder
        self._file: int | None = None

    def enter(self) -> None:
        """Creates and locks the file of this owner, if it is missing.

        Raises:
            OSError
        """
        path = self._folder / self.id
        if self._file is not None and path.exists():
            return
        self.leave()
        make_folder(self._folder)
        for other in self._folder.iterdir():
            # A file that cannot be opened, such as that of another user, stays.
            with contextlib.suppress(OSError):
                if not other.name.startswith("."):
                    self.is_alive(other.name)
        # Locked before it gets its name, so that no process sees the file without a lock.
        unnamed = self._folder / f".{self.id}"
        self._file = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        unnamed.replace(path)

    def is_alive(self, other: str) -> bool:
        """Whether the process of another owner still runs; removes the file of a dead one."""
        try:
            file = os.open(self._folder / other, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self._folder / other).unlink(missing_ok=True)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def leave(self) -> None:
        """Releases the lock, as the end of the process does."""
        if self._file is not None:
            (self._folder / self.id).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

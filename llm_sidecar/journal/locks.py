"""Locks between processes, and folders that survive a power loss."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Holds an advisory lock (flock) on a file, which is created if it is missing.

    Yields False, without the lock, if another process has it and `wait` is False. The kernel
    releases the lock when the process ends.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        yield False
        return
    try:
        yield True
    finally:
        os.close(file)


@contextlib.asynccontextmanager
async def held(path: Path) -> AsyncIterator[bool]:
    """Holds the lock on a file without blocking the event loop; yields False, at once, if another
    process has it."""
    with contextlib.ExitStack() as stack:
        yield await asyncio.to_thread(stack.enter_context, locked(path, wait=False))


def sync_folder(folder: Path) -> None:
    """Makes the directory entries of a folder survive a power loss."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents; they survive a power loss."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)

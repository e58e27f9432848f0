"""Locks between processes, and folders that survive a power loss."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

_PAUSE: Final = 0.02


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
async def held(path: Path, *, wait: bool = True, shared: bool = False) -> AsyncIterator[bool]:
    """The same as `locked`, without blocking the event loop."""
    while True:
        with contextlib.ExitStack() as stack:
            lock = locked(path, wait=False, shared=shared)
            mine = await asyncio.to_thread(stack.enter_context, lock)
            if mine or not wait:
                yield mine
                return
        await asyncio.sleep(_PAUSE)


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


def copy_synced(path: Path, to: Path) -> None:
    """Copies a file; the copy survives a power loss, and is removed if it is not complete."""
    try:
        shutil.copyfile(path, to)
        file = os.open(to, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(to.parent)
    except BaseException:
        to.unlink(missing_ok=True)
        raise


def dated(folder: Path, name: str) -> Path:
    """A new path in a folder, which is created if it is missing: the time, then the name."""
    make_folder(folder)
    return folder / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S%f}-{name}"

"""The targets of tests/live beside a single sidecar: see `serve` in tests/live_server.py."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.live_server import LiveServer, serve_one
from tests.programs import require_program
from tests.ray_server import start_ray
from tests.redis_server import RedisServer
from tests.s3_server import BUCKET, S3Server
from tests.scale_cluster import NAMES, serve_proxy


@contextlib.contextmanager
def two(
    folder: Path, *options: str, app: str | None = None, **environ: str
) -> Iterator[LiveServer]:
    """Two sidecars behind the proxy of deploy/scale, with journals of their own, one Redis, and one
    database on an object store, unless `environ` names others."""
    for program in ("redis-server", "haproxy"):
        require_program(program)
    store = _object_store()
    with contextlib.ExitStack() as stack:
        environ = store.environ() | {"LANCEDB_URI": f"s3://{BUCKET}/{folder.name}"} | environ
        if "REDIS_URL" not in environ:
            environ["REDIS_URL"] = stack.enter_context(RedisServer()).url

        def start(name: str) -> LiveServer:
            (folder / name).mkdir(exist_ok=True)
            own = {"LANCEDB_LOG_DIR": str(folder / name / "log")}
            return stack.enter_context(
                serve_one(folder / name, *options, app=app, **own, **environ)
            )

        with ThreadPoolExecutor() as pool:
            sidecars = tuple(pool.map(start, NAMES))
        proxy = stack.enter_context(serve_proxy(folder, sidecars))
        yield proxy
        for process in (sidecar.process for sidecar in sidecars):
            # Both at once, because each waits for its workers and its database.
            process.terminate()


@functools.cache
def _object_store() -> S3Server:
    """The one of all tests, with the variables by which they open the databases themselves."""
    store = S3Server()
    atexit.register(store.end)
    asyncio.run(store.create_bucket())
    os.environ.update(store.environ(), LANCEDB_LOG_DIR=_log_folder())
    return store


def _log_folder() -> str:
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="log-of-the-tests-")
    atexit.register(folder.cleanup)
    return folder.name


def ray(
    folder: Path, *, app: str | None = None, **environ: str
) -> contextlib.AbstractContextManager[LiveServer]:
    """The application on Ray Serve, with one replica of each model.

    Args:
        app: is ignored: the replica of the sidecar makes its app itself.
    """
    return start_ray(folder, **environ)


TARGETS: Final[dict[str, Callable[..., contextlib.AbstractContextManager[LiveServer]]]] = {
    "two": two,
    "ray": ray,
}

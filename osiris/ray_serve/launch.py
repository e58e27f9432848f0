"""Runs Ray on this machine, on loopback only, and the application on it.

Everything here that needs Ray imports it after `_prepare`: Ray reads the environment at its import.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from llm_sidecar.errors import CommandFailed
from osiris.ray_serve import ports
from osiris.ray_serve.options import Options

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
_UPDATE: Final = signal.SIGUSR1
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, _UPDATE)
_OBJECT_STORE: Final = 100 << 20
"""Bytes. Ray needs 75 MB; the messages between the deployments are too small for the store."""
_KEEP_ALIVE: Final = 15
"""Seconds, as for `python -m osiris`."""
_ROOT: Final = Path(__file__).resolve().parents[2]


def run(options: Options, port: int) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; SIGUSR1 replaces all replicas, one after the other.

    Raises:
        CommandFailed: Ray listens beyond loopback, or the application cannot start.
    """
    # Not below TMPDIR: the paths of sockets have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="osiris-ray-", dir="/tmp"))
    _prepare(folder)
    try:
        _serve(options, port, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: Path) -> None:
    """Sets Ray's variables, which all its processes inherit."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_SERVE_ENABLE_HA_PROXY"):
        os.environ.pop(name, None)
    variables = {
        # Whoever reaches Ray's ports without the token is refused.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # The address of a node is then 127.0.0.1 on Linux, too.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "osiris.ray_serve.request_id.in_proxy",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_enable_metrics_collection": "0",
        # Any free port: other Rays may run on this machine.
        "AUTOSCALER_METRIC_PORT": "0",
        "DASHBOARD_METRIC_PORT": "0",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    os.environ.update(variables)


def _serve(options: Options, port: int, folder: Path) -> None:
    import ray
    from ray import serve

    from osiris.ray_serve.app import build
    from osiris.ray_serve.handles import APP

    def deploy() -> None:
        # Each deployment is a new version, so all replicas are replaced.
        serve.run(build(options), name=APP, route_prefix="/", blocking=False)

    ray.init(
        address="local",
        _node_ip_address=LOOPBACK,
        include_dashboard=False,
        dashboard_host=LOOPBACK,
        # Bookkeeping: two versions of a replica may run at the same time.
        num_cpus=2 * (options.replicas * options.cpus + options.sidecars + 1),
        object_store_memory=_OBJECT_STORE,
        namespace=APP,
        _temp_dir=str(folder),
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": LOOPBACK, "port": port, "keep_alive_timeout_s": _KEEP_ALIVE},
        )
        try:
            deploy()
        except RuntimeError as error:
            raise CommandFailed(f"The application cannot start: {error}") from None
        if found := ports.exposed(os.getpid()):
            raise CommandFailed(f"Ray listens beyond loopback, so it ends: {', '.join(found)}")
        log.info("serving on http://%s:%d; SIGUSR1 replaces all replicas", LOOPBACK, port)
        asyncio.run(_until_stopped(deploy))
    finally:
        serve.shutdown()
        ray.shutdown()


async def _until_stopped(update: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    signals = asyncio.Queue[int]()
    for number in _SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    while await signals.get() == _UPDATE:
        log.info("replacing all replicas")
        try:
            await asyncio.to_thread(update)
        except RuntimeError as error:
            log.error("the update has failed: %s", error)
        else:
            log.info("all replicas are replaced")

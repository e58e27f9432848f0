"""The server's command: `python -m osiris`, which takes uvicorn's options.

The environment configures the sidecar, and `UVICORN_…` variables stand for options.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
from uvicorn.main import main as uvicorn_main

APP: Final = "osiris.server:app"
_FIXED: Final[dict[str, Any]] = {
    "app": APP,
    "factory": False,
    "interface": "asgi3",
    "lifespan": "on",
    # Connections are the app's own kind of this one: see `osiris.connection`.
    "http": "h11",
    "http2": False,
    "ws": "none",
    "ws_max_size": 1,
    "ws_max_queue": 1,
    "ws_ping_interval": None,
    "ws_ping_timeout": None,
    "ws_per_message_deflate": False,
    "timeout_worker_healthcheck": 1,
}
"""Parameters of uvicorn that are not options of ours."""
_KEEP_ALIVE: Final = 15
"""Seconds: clients commonly drop idle connections after 5, and a client should be the first."""

_LONGEST_SOCKET_PATH: Final = 107
"""Bytes, as unix(7) says."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the server, and exits with its status: 0 after a signal, 1 for a bad setting, 2 for a
    bad option, 3 where the start fails."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # Until the app itself handles it, and in a reloader, which only knows the other.
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    command().main(args=None if argv is None else list(argv), prog_name="osiris-sidecar")


def command() -> click.Command:
    """uvicorn's command for this app alone."""
    return click.Command(
        "osiris-sidecar",
        params=[_parameter(one) for one in uvicorn_main.params if one.name not in _FIXED],
        callback=_serve,
        context_settings={"auto_envvar_prefix": "UVICORN"},
        help="Serves the Osiris LLM sidecar. Environment variables configure it; the options are "
        "uvicorn's, and UVICORN_… variables stand for them.",
    )


def _parameter(parameter: click.Parameter) -> click.Parameter:
    changed = copy.copy(parameter)
    if changed.name == "port":
        changed.type = click.IntRange(0, 65535)
    elif changed.name == "timeout_keep_alive":
        changed.default = _KEEP_ALIVE
    elif changed.name == "workers" and isinstance(changed, click.Option):
        changed.help = "1: every other worker would load the models again."
    return changed


def _serve(**options: Any) -> None:
    _check(options)
    assert uvicorn_main.callback is not None
    try:
        uvicorn_main.callback(**_FIXED, **options)
    except OSError as error:
        # A file that an option names, or a socket that cannot be had.
        raise click.ClickException(f"the server cannot start: {error}") from None


def _check(options: dict[str, Any]) -> None:
    workers = options["workers"]
    asked = f"--workers {workers}"
    if workers is None:
        workers, asked = os.environ.get("WEB_CONCURRENCY") or 1, "WEB_CONCURRENCY"
    if str(workers) != "1":
        raise click.UsageError(
            f"{asked}: every worker would load the models again, so there is one; to serve more, "
            "run more sidecars behind a load balancer."
        )
    options["workers"] = 1
    if options["ssl_keyfile"] and not options["ssl_certfile"]:
        raise click.UsageError("--ssl-keyfile needs --ssl-certfile.")
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        if path := options[name]:
            _look(name, lambda path: Path(path).open("rb").close(), path)
    if path := options["uds"]:
        _look("uds", _can_be_socket, path)
    if (number := options["fd"]) is not None:
        _look("fd", lambda number: socket.socket(fileno=os.dup(number)).close(), number)
    if any(":" not in header for header in options["headers"]):
        raise click.UsageError("--header takes NAME:VALUE.")


def _can_be_socket(path: str) -> None:
    """Raises OSError where no Unix socket can be at a path; one that is there is replaced."""
    Path(path).parent.stat()
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise OSError(f"its path is longer than {_LONGEST_SOCKET_PATH} bytes")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise FileExistsError(errno.EEXIST, "There is something else", path)


def _look(name: str, look: Callable[[Any], object], value: object) -> None:
    """Refuses an option whose file is not there, with one sentence instead of a traceback."""
    try:
        look(value)
    except OSError as error:
        option = "--" + name.replace("_", "-")
        raise click.UsageError(f"{option} cannot be used: {error}") from None


if __name__ == "__main__":
    main()

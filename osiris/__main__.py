"""The command that starts the server: `python -m osiris`, with uvicorn's options.

Environment variables configure the sidecar. Each option also has a variable, `UVICORN_…`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
from uvicorn.main import main as uvicorn_main

from llm_sidecar import command_line

APP: Final = "osiris.server:app"
PROG: Final = "osiris-sidecar"
_FIXED: Final[dict[str, Any]] = {
    "app": APP,
    "factory": False,
    "interface": "asgi3",
    "lifespan": "on",
    # The app replaces it with a subclass: see `osiris.connection`.
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
"""Parameters of uvicorn that this command does not offer as options."""
_KEEP_ALIVE: Final = 15
"""Seconds. Clients commonly close idle connections after 5; a client should close before the
server."""

_LONGEST_SOCKET_PATH: Final = 107
"""Bytes, as unix(7) says."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server.

    Args:
        argv: the arguments; this process's by default.

    Returns:
        The exit status: 0 after a signal, 1 for a bad setting or certificate, 2 for a bad option, 3
        if the start fails.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # Until the app handles SIGHUP; and for a reloader, which handles only SIGTERM.
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    return command_line.run(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int | None:
    arguments = None if argv is None else list(argv)
    try:
        # It raises SystemExit if uvicorn sets the exit status.
        status: int | None = command().main(arguments, PROG, standalone_mode=False)
    except click.ClickException as error:
        command_line.say(f"{PROG}: {error.format_message()}")
        return error.exit_code
    except click.Abort:
        return command_line.INTERRUPTED
    return status


def command() -> click.Command:
    """uvicorn's command, for this app only."""
    return click.Command(
        PROG,
        params=[_parameter(one) for one in uvicorn_main.params if one.name not in _FIXED],
        callback=_serve,
        context_settings={"auto_envvar_prefix": "UVICORN"},
        help="Serves the Osiris LLM sidecar. Environment variables configure it. The options are "
        "uvicorn's; each can also be set as a variable with the prefix UVICORN_.",
    )


def _parameter(parameter: click.Parameter) -> click.Parameter:
    changed = copy.copy(parameter)
    if changed.name == "port":
        changed.type = click.IntRange(0, 65535)
    elif changed.name == "timeout_keep_alive":
        changed.default = _KEEP_ALIVE
    elif changed.name == "workers" and isinstance(changed, click.Option):
        changed.help = "Must be 1: each further worker would load the models again."
    return changed


def _serve(**options: Any) -> None:
    _check(options)
    assert uvicorn_main.callback is not None
    try:
        uvicorn_main.callback(**_FIXED, **options)
    except OSError as error:
        # For example a certificate that is invalid.
        raise click.ClickException(f"the server cannot start: {error}") from None


def _check(options: dict[str, Any]) -> None:
    workers = options["workers"]
    asked = f"--workers {workers}"
    if workers is None:
        workers, asked = os.environ.get("WEB_CONCURRENCY") or 1, "WEB_CONCURRENCY"
    if str(workers) != "1":
        raise click.UsageError(
            f"{asked}: there can only be 1 worker, because each one would load the models again; "
            "to serve more requests, run more sidecars behind a load balancer."
        )
    options["workers"] = 1
    if options["ssl_keyfile"] and not options["ssl_certfile"]:
        raise click.UsageError("--ssl-keyfile needs --ssl-certfile.")
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        if path := options[name]:
            _try_option(name, lambda path: Path(path).open("rb").close(), path)
    if path := options["uds"]:
        _try_option("uds", _check_socket_path, path)
    if (number := options["fd"]) is not None:
        _try_option("fd", lambda number: socket.socket(fileno=os.dup(number)).close(), number)
    if any(":" not in header for header in options["headers"]):
        raise click.UsageError("--header takes NAME:VALUE.")


def _check_socket_path(path: str) -> None:
    """Raises OSError if no Unix socket can be made at a path; an existing socket is replaced."""
    Path(path).parent.stat()
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise OSError(f"its path is longer than {_LONGEST_SOCKET_PATH} bytes")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise FileExistsError(errno.EEXIST, "The path exists and is not a socket", path)


def _try_option(name: str, use: Callable[[Any], object], value: object) -> None:
    """Refuses an option whose file cannot be used, with one sentence instead of a traceback."""
    try:
        use(value)
    except OSError as error:
        option = "--" + name.replace("_", "-")
        raise click.UsageError(f"{option} cannot be used: {error}") from None


if __name__ == "__main__":
    sys.exit(main())

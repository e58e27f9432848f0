"""The server's command: `python -m osiris`, which takes uvicorn's options.

The environment configures the sidecar, and `UVICORN_…` variables stand for options.
"""

from __future__ import annotations

import copy
import os
import signal
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server.

    Args:
        argv: the arguments; this process's unless given.

    Returns:
        The exit status: 0 after a signal, 1 for a bad setting, 2 for a bad option, 3 where the
        start fails.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # Until the app itself handles it, and in a reloader, which only knows the other.
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    return command_line.run(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int | None:
    arguments = None if argv is None else list(argv)
    try:
        # It raises SystemExit where uvicorn ends with a status of its own.
        status: int | None = command().main(arguments, PROG, standalone_mode=False)
    except click.ClickException as error:
        command_line.say(f"{PROG}: {error.format_message()}")
        return error.exit_code
    except click.Abort:
        return command_line.INTERRUPTED
    return status


def command() -> click.Command:
    """uvicorn's command for this app alone."""
    return click.Command(
        PROG,
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
        _look("uds", lambda path: Path(path).parent.stat(), path)
    if (number := options["fd"]) is not None:
        _look("fd", os.fstat, number)


def _look(name: str, look: Callable[[Any], object], value: object) -> None:
    """Refuses an option whose file is not there, with one sentence instead of a traceback."""
    try:
        look(value)
    except OSError as error:
        option = "--" + name.replace("_", "-")
        raise click.UsageError(f"{option} cannot be used: {error}") from None


if __name__ == "__main__":
    sys.exit(main())

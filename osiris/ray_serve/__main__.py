"""Runs the sidecar with Ray Serve on this machine: `python -m osiris.ray_serve --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm_sidecar import command_line
from llm_sidecar.settings import Settings
from osiris import logs
from osiris.ray_serve import launch
from osiris.ray_serve.options import Options, check, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; returns the exit status."""
    options, port = parse("python -m osiris.ray_serve", argv)
    return command_line.run(lambda: _run(options, port))


def _run(options: Options, port: int) -> None:
    settings = Settings.from_environ()
    check(settings, options)
    logs.configure(settings.telemetry.log_format)
    launch.run(options, port)


if __name__ == "__main__":
    sys.exit(main())

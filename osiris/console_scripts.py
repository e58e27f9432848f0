"""The commands that the package installs.

Each is the same as `python -m` of its module. Without extras, the package is only the client; the
commands are then installed too, and say which extra they need.
"""

from __future__ import annotations

import importlib
import sys


def serve() -> int | None:
    """`osiris-sidecar`: the HTTP server."""
    return _run("osiris.__main__", "server")


def database() -> int | None:
    """`osiris-sidecar-db`: reads and maintains the database."""
    return _run("llm_sidecar.db.__main__", "server")


def loader() -> int | None:
    """`osiris-sidecar-loader`: prepares models."""
    return _run("llm_sidecar.loader.__main__", "server,onnx,torch")


def speech() -> int | None:
    """`osiris-sidecar-speech`: a speech worker."""
    return _run("llm_sidecar.tts.__main__", "speech")


def _run(module: str, extra: str) -> int | None:
    """Runs `main` of a module; returns its exit status, None for 0."""
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"The package {error.name} is not installed."
            f" Install what this command needs: pip install 'osiris-llm-sidecar[{extra}]'\n"
        )
        return 1
    status: int | None = main()
    return status

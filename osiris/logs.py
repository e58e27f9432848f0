"""Logging of the server process."""

from __future__ import annotations

import logging

from llm_sidecar.logs import LogFormat, log_to_stderr
from osiris.middleware import access_log


def configure(log_format: LogFormat) -> None:
    """Logs to standard error, uvicorn's loggers included, unless logging is configured already.

    `AccessLog` replaces uvicorn's line for each request, which quotes the query. `--no-access-log`
    turns it off.
    """
    if not log_to_stderr(log_format):
        return
    for name in ("llm_sidecar", "osiris"):
        logging.getLogger(name).setLevel(logging.INFO)
    by_uvicorn = logging.getLogger("uvicorn.access")
    access_log.log.disabled = _is_turned_off()
    by_uvicorn.handlers.clear()
    # Without a handler, uvicorn does not create its line.
    by_uvicorn.propagate = False
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def _is_turned_off() -> bool:
    """Whether uvicorn has configured its loggers without the one for requests. Another server, such
    as Ray Serve, configures none of them."""
    names = ("uvicorn", "uvicorn.access")
    configured, access = (bool(logging.getLogger(name).handlers) for name in names)
    return configured and not access

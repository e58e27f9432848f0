"""The limit on the files that this process may open."""

from __future__ import annotations

import logging
import resource
from typing import Final

log = logging.getLogger(__name__)

_OTHER_FILES: Final = 512
"""Files that the process needs beside its connections: models, database, workers, event bus."""


def allow_files(connections: int) -> None:
    """Raises the limit so that there can be this many connections; logs a warning if it cannot."""
    files = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < files:
            log.warning(
                "this process may open only %d files, too few for MAX_CONNECTIONS: raise the limit "
                "to %d, or lower MAX_CONNECTIONS",
                wanted,
                files,
            )

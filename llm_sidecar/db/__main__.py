"""`python -m llm_sidecar.db`."""

import logging
import sys

from llm_sidecar.db.cli import cli_main

if __name__ == "__main__":
    # The command line says itself what went wrong.
    logging.getLogger("llm_sidecar").addHandler(logging.NullHandler())
    sys.exit(cli_main())

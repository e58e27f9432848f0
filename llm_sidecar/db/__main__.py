"""`python -m llm_sidecar.db`."""

import logging
import sys

from llm_sidecar.db.cli import cli_main


def main() -> int:
    """Runs the command line of this process; returns the exit status."""
    # The command line itself reports errors.
    logging.getLogger("llm_sidecar").addHandler(logging.NullHandler())
    return cli_main()


if __name__ == "__main__":
    sys.exit(main())

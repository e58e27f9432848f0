"""`python -m llm_sidecar.db`."""

import sys

from llm_sidecar.db.cli import cli_main

if __name__ == "__main__":
    sys.exit(cli_main())

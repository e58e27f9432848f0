"""The database: feedback, runs, scores and proposals in LanceDB.

Importing this package does not import lancedb and pyarrow, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_sidecar.db.queries import Correction
from llm_sidecar.db.rows import (
    FEEDBACK,
    PROPOSALS,
    RUNS,
    SCORES,
    TABLES,
    WITHDRAWALS,
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    Latencies,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    PublishedFeedback,
)
from llm_sidecar.db.store import Store, table_of
from llm_sidecar.db.synchronous import append_feedback, init_db, log_hermes_score, log_run


def cli_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `python -m llm_sidecar.db`.

    Args:
        argv: the arguments; default: those of this process.

    Returns:
        The exit status: 0; 1 if the database cannot be used or is damaged, or the output cannot be
        written; 2 for bad arguments; 130 after Ctrl-C.
    """
    # Imported here, because a server does not parse arguments.
    from llm_sidecar.db import __main__ as command

    return command.cli_main(argv)


__all__ = [
    "FEEDBACK",
    "PROPOSALS",
    "RUNS",
    "SCORES",
    "TABLES",
    "WITHDRAWALS",
    "Correction",
    "FeedbackWithdrawalSchema",
    "HermesScoreSchema",
    "Latencies",
    "OrchestratorRunSchema",
    "Phi3FeedbackSchema",
    "ProposalSchema",
    "PublishedFeedback",
    "Store",
    "append_feedback",
    "cli_main",
    "init_db",
    "log_hermes_score",
    "log_run",
    "table_of",
]

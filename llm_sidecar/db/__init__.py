"""The database room: feedback, runs, scores and proposals in LanceDB.

Importing it imports neither lancedb nor pyarrow: those take seconds.
"""

from __future__ import annotations

from llm_sidecar.db.cli import cli_main
from llm_sidecar.db.questions import Correction
from llm_sidecar.db.schema import (
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
from llm_sidecar.db.scripts import append_feedback, init_db, log_hermes_score, log_run
from llm_sidecar.db.store import Store, table_of

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

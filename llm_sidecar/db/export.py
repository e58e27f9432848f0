"""Training data from feedback: what was proposed, and what should have been.

`sft` gives the columns `prompt` and `completion`, `dpo` gives `prompt`, `chosen` and `rejected`,
each a list of chat messages: the conversational formats of TRL's SFT and DPO trainers
(https://huggingface.co/docs/trl/dataset_formats). The prompt is the chat with which the sidecar
asks Phi-3, so that training and serving agree. `jsonl` gives every feedback as it is, with its
prompt, proposal, assessment and score. Withdrawn feedback is left out of all three.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, Literal, NamedTuple

from llm_sidecar.db.queries import json_object, stream
from llm_sidecar.db.rows import FEEDBACK, FEEDBACK_ID, PROPOSALS, RUNS, WITHDRAWALS
from llm_sidecar.db.tables import Tables

Format = Literal["sft", "dpo", "jsonl"]
_AT_ONCE: Final = 500
"""Transactions that are looked up together."""
_EARLIEST: Final = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)


class Walk(NamedTuple):
    """What is known of a transaction; None where it is not."""

    prompt: str | None = None
    proposal: dict[str, Any] | None = None
    assessment: str | None = None
    score: float | None = None


class Skipped(NamedTuple):
    """How many rows of feedback are left out, and why."""

    withdrawn: int = 0
    without_prompt: int = 0
    invalid: int = 0
    without_rejected: int = 0

    def __str__(self) -> str:
        reasons = (
            (self.withdrawn, "withdrawn"),
            (self.without_prompt, "of an unknown transaction"),
            (self.invalid, "no valid proposal"),
            (self.without_rejected, "without another proposal to reject"),
        )
        return ", ".join(f"{count} {reason}" for count, reason in reasons if count)


class Export:
    """One export.

    Attributes:
        skipped: what gave no example, so far.
    """

    def __init__(self, tables: Tables, kind: Format, since: datetime.datetime = _EARLIEST) -> None:
        self.skipped = Skipped()
        self._tables = tables
        self._kind = kind
        self._since = since

    async def rows(self, progress: Callable[[str], None]) -> AsyncIterator[dict[str, Any]]:
        """The lines of the export, oldest feedback first.

        Raises:
            Exception: whatever lancedb raises.
        """
        feedback = await self._feedback()
        for start in range(0, len(feedback), _AT_ONCE):
            some = feedback[start : start + _AT_ONCE]
            walks = await self._walks({row["transaction_id"] for row in some})
            for row in some:
                line = self._line(row, walks.get(row["transaction_id"], Walk()))
                if line is not None:
                    yield line
            progress(f"{start + len(some)} of {len(feedback)} feedback rows")

    async def _feedback(self) -> list[dict[str, Any]]:
        """For training the latest correction of each transaction, otherwise all feedback."""
        columns = [
            "transaction_id",
            "timestamp",
            "feedback_type",
            "feedback_content",
            "corrected_proposal",
            "author",
        ]
        withdrawn = {
            feedback_id
            async for batch in stream(self._tables, WITHDRAWALS, columns=[FEEDBACK_ID])
            for feedback_id in batch[FEEDBACK_ID]
        }
        rows = []
        read = [FEEDBACK_ID, *columns]
        async for batch in stream(self._tables, FEEDBACK, since=self._since, columns=read):
            for feedback_id, *values in zip(*(batch[name] for name in read), strict=True):
                if feedback_id in withdrawn:
                    self._skip("withdrawn")
                else:
                    rows.append(dict(zip(columns, values, strict=True)))
        rows.sort(key=lambda row: row["timestamp"])
        if self._kind == "jsonl":
            return rows
        latest: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["corrected_proposal"]:
                latest.pop(row["transaction_id"], None)
                latest[row["transaction_id"]] = row
        return list(latest.values())

    async def _walks(self, transactions: Iterable[str]) -> dict[str, Walk]:
        from lancedb.expr import col

        wanted = list(transactions)
        # Runs of before there was a table of proposals are known from what they gave.
        runs = self._tables[RUNS].query().where(col("run_id").isin(wanted))
        walks = {
            run["run_id"]: _walk_of_run(run["input_query"], run["final_output"])
            for run in await runs.select(["run_id", "input_query", "final_output"]).to_list()
        }
        proposals = self._tables[PROPOSALS].query().where(col("transaction_id").isin(wanted))
        for row in await proposals.to_list():
            walks[row["transaction_id"]] = Walk(
                row["prompt"], json_object(row["proposal"]), row["assessment"], row["score"]
            )
        return walks

    def _line(self, row: dict[str, Any], walk: Walk) -> dict[str, Any] | None:
        from llm_sidecar import proposals

        corrected = json_object(row["corrected_proposal"])
        if self._kind == "jsonl":
            shown = {**row, "timestamp": row["timestamp"].isoformat()}
            return {**shown, "corrected_proposal": corrected, **walk._asdict()}
        if walk.prompt is None:
            self._skip("without_prompt")
            return None
        if not proposals.is_valid(corrected):
            self._skip("invalid")
            return None
        prompt = proposals.build_messages(walk.prompt)
        chosen = _said(corrected)
        if self._kind == "sft":
            return {"prompt": prompt, "completion": chosen}
        rejected = _said(walk.proposal)
        if walk.proposal is None or rejected == chosen:
            self._skip("without_rejected")
            return None
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _skip(self, reason: str) -> None:
        self.skipped = self.skipped._replace(**{reason: getattr(self.skipped, reason) + 1})


def _said(proposal: dict[str, Any] | None) -> list[dict[str, str]]:
    """The proposal as Phi-3 says it: keys in the order of the guidance, and those distances as null
    that a person leaves out."""
    from llm_sidecar import proposals

    whole = {"new_stop_pct": None, "new_target_pct": None} | (proposal or {})
    text = proposals.dumps(proposals.in_order(whole) | whole)
    return [{"role": "assistant", "content": text}]


def _walk_of_run(prompt: str, final_output: str) -> Walk:
    output = json_object(final_output) or {}
    proposal = output.get("proposal")
    return Walk(
        prompt,
        proposal if isinstance(proposal, dict) else None,
        output.get("assessment"),
        output.get("score"),
    )

"""The command `replay` of `python -m llm_sidecar.db`: reads a proposal, generates it again, and
reports the differences."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Final

from pydantic import ValidationError

from llm_sidecar import command_line
from llm_sidecar.db import PROPOSALS, queries
from llm_sidecar.db.cli_commands import read
from llm_sidecar.db.cli_output import line
from llm_sidecar.db.read_only import JournalRows
from llm_sidecar.db.tables import Tables
from llm_sidecar.errors import CommandFailed
from llm_sidecar.models.registry import create_models
from llm_sidecar.services.provenance import Provenance
from llm_sidecar.services.replay import Difference, Recorded, Report, replay
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import Observers

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_SHOWN_DIGITS: Final = 12
"""Digits of a fingerprint that are enough to tell two apart."""


async def command(transaction_id: str, *, as_json: bool) -> int:
    """Replays one proposal; fails if a text differs, or there is nothing to replay.

    Raises:
        SidecarError, SettingsError: the database or a model is unavailable.
    """
    found = await read(lambda tables, waiting: recorded(tables, waiting, transaction_id))
    command_line.progress("loading the models")
    settings = Settings.from_environ()
    # The command waits as long as a load may take.
    patient = settings.models.model_copy(update={"load_wait": None, "preload": False})
    settings = settings.model_copy(update={"models": patient})
    models = create_models(settings, Observers(), lambda death: None)
    report = await replay(found, models, settings)
    if as_json:
        line(json.dumps(_as_json(transaction_id, report)))
    else:
        for text in _as_text(report):
            line(text)
    return command_line.OK if report.same else command_line.FAILED


async def recorded(tables: Tables, waiting: JournalRows, transaction_id: str) -> Recorded:
    """Reads a stored proposal.

    Raises:
        CommandFailed: it is not stored, or its provenance is not.
    """
    rows = (await queries.transaction(tables, transaction_id))[PROPOSALS]
    rows += [
        row for row in waiting.rows.get(PROPOSALS, []) if row["transaction_id"] == transaction_id
    ]
    if not rows:
        raise CommandFailed("No proposal with this transaction_id is stored.")
    # A proposal is stored before its critique, and again with it.
    row = max(rows, key=lambda row: (row["assessment"] != "", row["timestamp"]))
    if row["provenance"] is None:
        raise CommandFailed(
            "The proposal cannot be replayed: the version of the sidecar that stored it did not "
            "record its provenance."
        )
    try:
        provenance = Provenance.model_validate_json(row["provenance"])
    except ValidationError:
        raise CommandFailed(
            "The proposal cannot be replayed: this version of the sidecar cannot read its "
            "provenance; use the one that stored it."
        ) from None
    return Recorded(
        row["prompt"],
        json.loads(row["proposal"]),
        row["assessment"],
        row["score"],
        provenance,
        await queries.corrections(tables, provenance.examples),
    )


def _as_json(transaction_id: str, report: Report) -> dict[str, object]:
    results = {
        name: {"same": result.same, **asdict(result)} for name, result in report.results.items()
    }
    return {
        "transaction_id": transaction_id,
        "same": report.same,
        **results,
        "differences": [asdict(difference) for difference in report.differences],
    }


def _as_text(report: Report) -> list[str]:
    lines: list[str] = []
    for name, result in report.results.items():
        if result.same:
            lines.append(f"{name}: the same")
        else:
            lines += [f"{name}: differs", f"  then: {result.then}", f"  now:  {result.now}"]
    if report.differences:
        lines += ["What has changed since then:", *map(_line_of, report.differences)]
    elif report.same:
        lines.append("Nothing that is recorded has changed.")
    else:
        lines.append("Nothing that is recorded has changed, but the result differs.")
    return lines


def _line_of(difference: Difference) -> str:
    then, now = (_shown(value) for value in (difference.then, difference.now))
    return f"  {difference.fact}: then {then}, now {now}"


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:_SHOWN_DIGITS] if _DIGEST.fullmatch(value) else value

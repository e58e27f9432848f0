"""Generates the tables of the documentation from the code.

    .venv/bin/python -m tests.docs_tables

writes each table between its markers in `docs/`: `<!-- generated: NAME -->` and
`<!-- end of NAME -->`. `tests/integration/test_docs_tables.py` fails while a table differs from the
code. It also writes `docs/asyncapi.yaml`, see `tests.asyncapi`.
"""

from __future__ import annotations

import ast
import datetime
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from llm_sidecar.db import rows as db_rows
from llm_sidecar.db import schema
from llm_sidecar.services.events import (
    ADAPTER_SWAPPED,
    FEEDBACK_SUBMITTED,
    PAYLOADS,
    PROPOSAL_ASSESSED,
    PROPOSAL_CREATED,
)
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.tts.voice import AUDIO_BYTES
from osiris.middleware.metrics import sidecar_metrics
from tests import asyncapi

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
COMMAND: Final = ".venv/bin/python -m tests.docs_tables"

METRIC_GROUPS: Final = {
    "HTTP": r"http_",
    "Event bus": r"sidecar_event_bus_",
    "Database": r"sidecar_database_",
    "Speech": r"sidecar_speech_",
    "Proposals and scores": r"sidecar_(proposals|ungrounded|.*hermes_(score|answer))",
    "Process": r"process_",
    "Models": r"sidecar_",
}
"""How the names of a group begin; the first that matches counts."""
METRIC_ORDER: Final = (
    *("HTTP", "Models", "Proposals and scores", "Event bus", "Database", "Speech", "Process"),
)

COLUMNS: Final = {
    "adapter": "The Phi-3 adapter that was in use. Null for none.",
    "answer_mass": "The probability of the answers 0 to 10 in total. Null in older rows.",
    "assessment": "Hermes' critique. Empty if there is none.",
    "author": "The name of the API key that sent the feedback. Null without a named key.",
    "corrected_proposal": "The proposal that should have been made, as JSON. Null for none.",
    "error_message": "Why the run failed. Null if it did not.",
    "feedback_content": "The comment, the rating or an object as JSON.",
    "feedback_id": "The id of the feedback. Feedback that arrives twice is one row.",
    "feedback_type": "`correction`, `rating`, `qualitative_comment` or `human_edit`.",
    "final_output": "Proposal, assessment, score and its answer mass, as JSON. Empty without a "
    "proposal.",
    "grounded": "`true`, or the ungrounded fields separated by commas. Null if not checked.",
    "input_query": "The prompt.",
    "latencies": "Seconds for the proposal, the assessment and the score, queueing included.",
    "model": "The model that wrote the proposal.",
    "prompt": "The prompt.",
    "proposal": "The proposal as JSON.",
    "provenance": "The [provenance](#provenance) of the proposal, as JSON. Null in rows of "
    "older versions.",
    "rationale": "The critique of the run; of a score alone, the rationale of the proposal.",
    "received": "When the sidecar received the feedback. It orders feedback.",
    "row_id": "The key. A row that is written twice is one row.",
    "hermes_scores.run_id": "The `proposal_id` of the score, or the `transaction_id` of the run.",
    "run_id": "The `transaction_id` of the run.",
    "schema_version": "The version that the sender of the feedback named.",
    "score": "Hermes' score, 0 to 1.",
    "score_reliable": "Whether the answer mass reached `MIN_ANSWER_MASS` at that time. If not, the "
    "score counts in no mean and is no training data. Null in older rows, which count.",
    "source": "`direct` for HTTP and scripts, `bus` for Redis.",
    "status": "`success`, `partial` (not fully assessed) or `error` (no proposal).",
    "phi3_feedback.timestamp": "When the feedback was given, as its sender says.",
    "timestamp": "When the row was made.",
    "transaction_id": "The run that the row belongs to.",
}
"""What each column of the database means; with its table where tables differ."""

EVENTS: Final = {
    PROPOSAL_CREATED: "Phi-3 has finished a proposal, after the attempt to store it",
    PROPOSAL_ASSESSED: "Hermes has criticised and scored the proposal, after the attempt to "
    "store it",
    FEEDBACK_SUBMITTED: "feedback is stored",
    ADAPTER_SWAPPED: "Phi-3 uses another adapter",
    AUDIO_BYTES: "a part of a text has been spoken",
}
"""When each event is published."""


def settings() -> str:
    """Every variable of `Settings`: meaning, values and default, in groups."""
    sections = []
    for title, group in Settings.groups().items():
        meanings = _attribute_docstrings(group)
        rows = [
            (f"`{field.alias}`", meanings[name], field.description or "", _default(field.default))
            for name, field in group.model_fields.items()
        ]
        head = ("variable", "meaning", "values", "default")
        sections.append(f"### {title.capitalize()}\n\n{_table(head, rows)}")
    return "\n\n".join(sections)


def metrics() -> str:
    """Every metric of `/metrics`: type, labels and help text, in groups."""
    registry = sidecar_metrics()
    registry.answered("GET", 200, "/health", 0.001)
    registry.watch(_some_health)
    groups: dict[str, list[tuple[str, ...]]] = {group: [] for group in METRIC_ORDER}
    for family in text_string_to_metric_families(registry.render().decode()):
        suffix = "_total" if family.type == "counter" else ""
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        labels.pop("le", None)
        row = (
            f"`{family.name}{suffix}`",
            family.type,
            ", ".join(sorted(labels)),
            family.documentation,
        )
        groups[_metric_group(family.name)].append(row)
    head = ("metric", "type", "labels", "meaning")
    return "\n\n".join(
        f"### {group}\n\n{_table(head, sorted(rows))}" for group, rows in groups.items()
    )


def events() -> str:
    """Every channel: when an event is published, and its payload."""
    rows = []
    for channel, when in EVENTS.items():
        keys = PAYLOADS[channel].model_fields if channel in PAYLOADS else ()
        payload = ", ".join(f"`{key}`" for key in keys) or "base64 of one complete WAV"
        rows.append((f"`{channel}`", when, payload))
    return _table(("channel", "published when", "payload"), rows)


def tables() -> str:
    """Every table of the database with its columns."""
    sections = []
    for table in sorted(db_rows.TABLES):
        summary = inspect.getdoc(db_rows.SCHEMAS[table]) or ""
        rows = [
            (
                f"`{column.name}`",
                _arrow_type(column.type) + (", or null" if column.nullable else ""),
                COLUMNS.get(f"{table}.{column.name}") or COLUMNS[column.name],
            )
            for column in schema.arrow_schemas()[table]
        ]
        first = " ".join(summary.partition("\n\n")[0].split())
        sections.append(
            f"### `{table}`\n\n{first}\n\n{_table(('column', 'type', 'meaning'), rows)}"
        )
    return "\n\n".join(sections)


GENERATED: Final[Mapping[str, tuple[str, Callable[[], str]]]] = {
    "settings": ("configuration.md", settings),
    "metrics": ("metrics.md", metrics),
    "events": ("events.md", events),
    "tables": ("data.md", tables),
}
"""The page of each generated text, and what writes it."""


def current(name: str) -> str:
    """The page with this generated text as the code has it now.

    Raises:
        ValueError: the page has no markers of that name.
    """
    page, write = GENERATED[name]
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
    before, found, rest = (DOCS / page).read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"docs/{page} needs the lines {begin} and {end}")
    return f"{before}{begin}\n\n{write()}\n\n{end}{after}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string below each attribute of a class.

    Raises:
        ValueError: an annotated attribute has none.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, below in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        value = below.value if isinstance(below, ast.Expr) else None
        if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
            raise ValueError(
                f"{cls.__name__}.{statement.target.id} needs a string that explains it"
            )
        found[statement.target.id] = " ".join(value.value.split())
    return found


def _default(value: object) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is PydanticUndefined or value in (None, (), ""):
        return ""
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    return f"`{text.removesuffix('.0')}`"


def _metric_group(name: str) -> str:
    return next(group for group, begins in METRIC_GROUPS.items() if re.match(begins, name))


def _some_health() -> dict[str, Any]:
    """The health of a sidecar with every component in use, so that each metric exists."""
    health = Sidecar(Settings.from_environ({"REDIS_URL": "memory://"})).health.report()
    now = datetime.datetime.now(datetime.UTC).isoformat()
    health["mean_hermes_score_last_24h"] = 0.5
    health["database"] |= {"last_compaction": now, "fragments": dict.fromkeys(db_rows.TABLES, 1)}
    for name, model in health["models"].items():
        model |= {"model": f"{name}/demo", "runtime": "torch", "device": "cpu"}
        model["speed"] = {"prefill": 100.0, "decode": 10.0}
    for part in ("proposal", "critique", "score"):
        health["forecast"][f"{part}_seconds"] = 1.0
    return health


def _arrow_type(kind: object) -> str:
    text = str(kind)
    if text.startswith("timestamp"):
        return "time"
    names = {"string": "text", "double": "number", "bool": "boolean"}
    return names.get(text.partition("<")[0], "object")


if __name__ == "__main__":
    (DOCS / "asyncapi.yaml").write_text(asyncapi.text())
    for generated, (its_page, _) in GENERATED.items():
        try:
            (DOCS / its_page).write_text(current(generated))
        except ValueError as error:
            sys.exit(str(error))

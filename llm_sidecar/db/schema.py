"""The Arrow schema of each table: columns, version, and the id of the database.

A timestamp is UTC with microseconds. An object is compact JSON text.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from llm_sidecar import timestamps
from llm_sidecar.db.rows import (
    FEEDBACK,
    FEEDBACK_ID,
    KEYS,
    PROPOSALS,
    ROW_ID,
    RUNS,
    SCORES,
    TABLES,
    WITHDRAWALS,
    Latencies,
    Phi3FeedbackSchema,
)
from llm_sidecar.errors import DatabaseUnavailable

if TYPE_CHECKING:
    import pyarrow as pa

VERSION: Final = "6"
"""The version of the schemas, in their Arrow metadata. Version 2 added keys and aware timestamps in
microseconds; version 3 added the columns in `ADDED`, `grounded` and the table of withdrawals;
version 4 added `author`, version 5 `provenance`, version 6 `answer_mass` and `score_reliable`.
Version 1 is everything before. `migrate` upgrades all of them."""
_VERSION_KEY: Final = b"osiris_schema_version"
_DATABASE_KEY: Final = b"osiris_database"

ADDED: Final[dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]]] = {
    FEEDBACK: {
        # Feedback with a future timestamp would stay the newest until then.
        "received": lambda row: min(row["timestamp"], timestamps.now()),
        "source": lambda row: Phi3FeedbackSchema.SOURCE,
        ROW_ID: lambda row: row[FEEDBACK_ID],
    },
}
"""The columns that version 2 lacks and that cannot be null, each with the value for an old row."""


def upgraded(table: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of version 2 or later with all current columns; None for any other row.

    Logs of processes that have died may hold rows of older versions.
    """
    if table not in TABLES:
        return None
    schema, added = arrow_schemas()[table], ADDED.get(table, {})
    whole = dict(row)
    for field in schema:
        if field.name not in row and field.name in added:
            whole[field.name] = added[field.name](row)
        elif field.name not in row and field.nullable:
            whole[field.name] = None
    return whole if set(whole) == set(schema.names) else None


def is_current(table: str, schema: pa.Schema) -> bool:
    """Whether an Arrow schema is the current one of the table."""
    version = (schema.metadata or {}).get(_VERSION_KEY)
    return bool(schema.equals(arrow_schemas()[table]) and version == VERSION.encode())


def require_not_newer(table: str, schema: pa.Schema) -> None:
    """Raises DatabaseUnavailable for a table that a later version of the sidecar has written."""
    version = (schema.metadata or {}).get(_VERSION_KEY, b"1").decode()
    if not version.isdigit() or int(version) > int(VERSION):
        raise DatabaseUnavailable(
            f"The table {table} is of version {version}, and this sidecar knows {VERSION}; "
            "update the sidecar.",
            retry_after=30,
        )


@functools.cache
def arrow_schemas() -> dict[str, pa.Schema]:
    """Arrow schema of every table, in the order of `TABLES`."""
    import pyarrow as pa

    def text(name: str, nullable: bool = False) -> pa.Field:
        return pa.field(name, pa.string(), nullable)

    def number(name: str, nullable: bool = False) -> pa.Field:
        return pa.field(name, pa.float64(), nullable)

    def flag(name: str) -> pa.Field:
        return pa.field(name, pa.bool_(), nullable=True)

    def instant(name: str) -> pa.Field:
        return pa.field(name, pa.timestamp("us", tz="UTC"), nullable=False)

    time = instant("timestamp")
    columns = {
        FEEDBACK: [
            text("transaction_id"),
            time,
            text("feedback_type"),
            text("feedback_content"),
            text("schema_version"),
            text("corrected_proposal", nullable=True),
            text(FEEDBACK_ID),
            instant("received"),
            text("source"),
            text("author", nullable=True),
        ],
        RUNS: [
            text("run_id"),
            time,
            text("input_query"),
            text("final_output"),
            text("status"),
            text("error_message", nullable=True),
        ],
        SCORES: [
            text("run_id"),
            time,
            number("score"),
            text("rationale"),
            number("answer_mass", nullable=True),
            flag("score_reliable"),
        ],
        PROPOSALS: [
            text("transaction_id"),
            time,
            text("prompt"),
            text("proposal"),
            text("assessment"),
            number("score", nullable=True),
            text("model"),
            text("adapter", nullable=True),
            pa.field(
                "latencies",
                pa.struct([number(name, nullable=True) for name in Latencies.model_fields]),
                nullable=False,
            ),
            text("grounded", nullable=True),
            text("provenance", nullable=True),
            number("answer_mass", nullable=True),
            flag("score_reliable"),
        ],
        WITHDRAWALS: [text("transaction_id"), time],
    }
    # The metadata makes two processes that insert the same key at once conflict, and one retry.
    unique = {"lance-schema:unenforced-primary-key": "true"}
    return {
        table: pa.schema(
            [*columns[table], text(KEYS[table]).with_metadata(unique)],
            metadata={_VERSION_KEY: VERSION},
        )
        for table in TABLES
    }


def new_table_schema(table: str) -> pa.Schema:
    """The Arrow schema to create a table with. That of feedback has a new id for the database."""
    schema = arrow_schemas()[table]
    if table != FEEDBACK:
        return schema
    return schema.with_metadata({**schema.metadata, _DATABASE_KEY: uuid.uuid4().hex.encode()})


def database_id(schema: pa.Schema) -> str | None:
    """The database's id, from the schema of its feedback table, or None."""
    found: bytes | None = (schema.metadata or {}).get(_DATABASE_KEY)
    return None if found is None else found.decode()

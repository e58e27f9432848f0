"""The table of errors: one row for each class, with the values that clients and operators see."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

# Each of these modules defines a class of errors of its own.
import llm_sidecar.command_line
import llm_sidecar.db.cli_output
import llm_sidecar.db.tables
import llm_sidecar.models.conversion
import llm_sidecar.models.local.process  # noqa: F401
from llm_sidecar import errors
from llm_sidecar.errors import DatabaseUnavailable, QueueFull, SidecarError
from llm_sidecar.telemetry.calls import error_name
from osiris.errors import ERRORS, install, row_of
from tests.unit.asgi import client

SOURCES = Path(errors.__file__).parent
EXPECTED = {
    "SettingsError": (500, "SettingsError", logging.ERROR),
    "CommandFailed": (500, "CommandFailed", logging.ERROR),
    "InvalidRequest": (422, "InvalidRequest", logging.DEBUG),
    "RequestKeyReused": (422, "RequestKeyReused", logging.DEBUG),
    "NotFound": (404, "NotFound", logging.DEBUG),
    "AdapterRejected": (409, "AdapterRejected", logging.DEBUG),
    "QueueFull": (429, "QueueFull", logging.DEBUG),
    "Unavailable": (503, "Unavailable", logging.WARNING),
    "ModelUnavailable": (503, "ModelUnavailable", logging.WARNING),
    "VoiceUnavailable": (503, "VoiceUnavailable", logging.WARNING),
    "DatabaseUnavailable": (503, "DatabaseUnavailable", logging.WARNING),
    "DeadlineExceeded": (504, "DeadlineExceeded", logging.WARNING),
}


def subclasses(kind: type[SidecarError] = SidecarError) -> Iterator[type[SidecarError]]:
    """Every subclass that the package defines; tests define some of their own."""
    for subclass in kind.__subclasses__():
        if subclass.__module__.startswith("llm_sidecar."):
            yield subclass
        yield from subclasses(subclass)


def of_the_errors_module(kind: type[SidecarError]) -> bool:
    return kind.__module__ == errors.__name__


def test_every_error_has_exactly_one_row_with_the_right_values() -> None:
    rows = {
        kind.__name__: tuple(ERRORS[kind]) for kind in filter(of_the_errors_module, subclasses())
    }
    assert rows == EXPECTED
    assert len(ERRORS) == len(EXPECTED)


def test_an_error_of_another_module_has_the_row_of_its_base_class() -> None:
    others = [kind for kind in subclasses() if not of_the_errors_module(kind)]
    assert others
    for kind in others:
        assert kind not in ERRORS
        base = next(filter(of_the_errors_module, kind.__mro__))
        assert row_of(kind) == ERRORS[base]


def test_no_class_of_errors_is_missing_here() -> None:
    found = {kind.__name__ for kind in subclasses()}
    defined = {
        node.name
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and {getattr(base, "id", "") for base in node.bases} & {*found, "SidecarError"}
    }
    assert defined == found


def test_the_metrics_count_each_error_under_its_label() -> None:
    for kind in subclasses():
        assert error_name(kind.__new__(kind)) == row_of(kind).metric_label


def test_the_root_class_has_no_row() -> None:
    with pytest.raises(LookupError, match="SidecarError has no row"):
        row_of(SidecarError)


@pytest.mark.parametrize(
    ("error", "level"),
    [(QueueFull("Full."), None), (DatabaseUnavailable("The disk is full."), "WARNING")],
)
async def test_an_answer_is_logged_at_the_level_of_its_row(
    caplog: pytest.LogCaptureFixture, error: SidecarError, level: str | None
) -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    with caplog.at_level(logging.INFO):
        async with client(app) as asking:
            response = await asking.get("/")
    assert response.status_code == row_of(type(error)).status
    lines = [record for record in caplog.records if record.name == "osiris.errors"]
    assert [line.levelname for line in lines] == ([] if level is None else [level])
    for line in lines:
        assert line.getMessage() == f"the request failed: {error.detail}"
        assert vars(line)["error"] == type(error).__name__

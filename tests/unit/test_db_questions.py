"""What is read from a text column."""

from __future__ import annotations

import pytest

from llm_sidecar.db.questions import json_object


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("{}", {}),
        ("", None),
        (None, None),
        ("null", None),
        ("[1]", None),
        ('"a"', None),
        ("7", None),
        ("{", None),
        ("plain words", None),
        ("[" * 100_000, None),
    ],
)
def test_an_object_is_read_and_nothing_else_is(text: str | None, found: object) -> None:
    assert json_object(text) == found

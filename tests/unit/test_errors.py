"""Errors in one line."""

from __future__ import annotations

from llm_sidecar.errors import AdapterRejected, one_line


def test_an_error_is_one_short_line() -> None:
    error = AdapterRejected("it holds \x1b[31m\n" + "x" * 1000)
    assert one_line(error) == "it holds [31m " + "x" * 385
    assert one_line(ValueError("a\tb")) == "ValueError: a b"

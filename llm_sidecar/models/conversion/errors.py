"""The error of a conversion."""

from __future__ import annotations

from llm_sidecar.errors import CommandFailed


class ConversionFailed(CommandFailed):
    """The model cannot be converted, or the result is too far from it."""

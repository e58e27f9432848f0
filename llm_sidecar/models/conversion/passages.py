"""The shipped text on which models are compared: market language, and a few unusual characters."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("market_text.txt")


def passages() -> list[str]:
    """The passages of the text; each is read without the others, so a short context is enough."""
    return _FILE.read_text(encoding="utf-8").rstrip("\n").split("\n\n")

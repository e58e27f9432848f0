"""Text templates with alternatives: `{long|bought {two|three}} <t>`.

Braces hold alternatives, nested at will and empty ones allowed; names in angle brackets are slots
that the caller fills.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Final

_INNERMOST: Final = re.compile(r"\{([^{}]*)\}")
_SLOT: Final = re.compile(r"<([a-z_]+)>")


def spin(template: str, rng: Random, slot: Callable[[str], str]) -> str:
    """One random reading of `template`, its slots filled by `slot(name)`."""
    found = 1
    while found:
        template, found = _INNERMOST.subn(lambda m: rng.choice(m[1].split("|")), template)
    return _SLOT.sub(lambda m: slot(m[1]), template)

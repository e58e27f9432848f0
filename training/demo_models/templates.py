"""Text templates with alternatives: `{long|bought {two|three}} <t>`.

Braces hold alternatives, which may be nested or empty. Names in angle brackets are slots, which the
caller fills.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Final

_INNERMOST: Final = re.compile(r"\{([^{}]*)\}")
_SLOT: Final = re.compile(r"<([a-z_]+)>")


def expand(template: str, rng: Random, slot: Callable[[str], str]) -> str:
    """Picks random alternatives of `template`, then replaces each slot by `slot(name)`."""
    found = 1
    while found:
        template, found = _INNERMOST.subn(lambda m: rng.choice(m[1].split("|")), template)
    return _SLOT.sub(lambda m: slot(m[1]), template)

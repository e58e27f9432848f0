"""Matches regular expressions that come with an adapter, within a bound.

Some expressions take practically forever, and Python's matching cannot be interrupted from outside.
So a process of its own matches them (this file, run as a program) and is ended at the bound.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 10.0
"""How long all the matching may take."""


class PatternsFailed(Exception):
    """The message says why, to follow the name of the patterns."""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The index of the first pattern that matches each name as PEFT matches it, or None.

    PEFT lets a pattern match a whole name or all of it that follows a dot (`get_pattern_key` in
    peft/utils/other.py).

    Raises:
        PatternsFailed: one is no regular expression, or the matching takes longer than `SECONDS`.
    """
    if not patterns:
        return [None] * len(names)
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps([patterns, names]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise PatternsFailed(f"cannot be matched within {SECONDS:g} s") from None
    except subprocess.CalledProcessError:
        raise PatternsFailed("holds what cannot be matched as a regular expression") from None
    found: list[int | None] = json.loads(done.stdout)
    return found


def _main() -> None:
    patterns, names = json.load(sys.stdin)
    whole = [re.compile(rf"(.*\.)?({pattern})") for pattern in patterns]
    matches = (
        next((index for index, one in enumerate(whole) if one.fullmatch(name)), None)
        for name in names
    )
    json.dump(list(matches), sys.stdout)


if __name__ == "__main__":
    _main()

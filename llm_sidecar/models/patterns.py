"""Matches an adapter's regular expressions within a time limit.

Some expressions take practically forever, and Python cannot interrupt matching. So a separate
process (this file, run as a program) matches them, and is killed at the time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 10.0
"""Time limit for all patterns and names."""


class PatternsFailed(Exception):
    """The patterns of a setting cannot be used; the message follows the setting's name."""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name, the index of the first pattern that matches it as in PEFT, or None.

    In PEFT a pattern has to match the whole name or all of it after a dot (`get_pattern_key` in
    peft/utils/other.py).

    Raises:
        PatternsFailed: a pattern is not a valid regular expression, or matching takes longer than
            `SECONDS`.
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
        raise PatternsFailed("holds an invalid regular expression") from None
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

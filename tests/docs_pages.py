"""README.md and the pages of docs/: their fenced blocks, headings and links."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Final, NamedTuple

from tests.live_server import ROOT

PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_FENCE: Final = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        place: its page and line.
        language: after the opening fence; empty for none.
        text: what is in it.
        shown: the language and text of the answer that follows a command; None without one.
    """

    place: str
    language: str
    text: str
    shown: tuple[str, str] | None = None


COMMANDS: Final = ("bash", "python")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order. A `json` or `text` block that follows a command is its
    answer, and no block of its own."""
    source = page.read_text()
    found: list[Block] = []
    end_of_last = -1
    for match in _FENCE.finditer(source):
        language, text = match[2], textwrap.dedent(match[3])
        follows = end_of_last >= 0 and not source[end_of_last : match.start()].strip()
        end_of_last = match.end()
        if follows and language in ("json", "text") and found[-1].language in COMMANDS:
            found[-1] = found[-1]._replace(shown=(language, text))
            continue
        place = f"{page.relative_to(ROOT)}:{source.count(chr(10), 0, match.start()) + 1}"
        found.append(Block(place, language, text))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}

"""The layout of rows on a terminal, with rich."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.console import Console, OverflowMethod
from rich.table import Table
from rich.text import Text

_GAP: Final = 2
"""Cells between two columns."""
_SHORT: Final = 19
"""Values of up to this many cells, such as times, are never shortened."""
_LEAST: Final = 8
"""Minimum cells for a longer value in a table."""
_BESIDE: Final = 20
"""Minimum cells for a value beside its name in a block; otherwise it goes on the next line."""
_UNBOUNDED: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """How to lay out rows.

    Attributes:
        width: width of the terminal, in cells.
        wide: whether long values are not shortened.
        cut: how a shortened value ends.
    """

    width: int
    wide: bool
    cut: OverflowMethod

    def lines(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """A table if the terminal is wide enough, otherwise a block of lines for each row."""
        needed = sum(self._least_width(column) for column in zip(columns, *rows, strict=True))
        fits = needed + _GAP * (len(columns) - 1) <= self.width
        return self._table(columns, rows) if fits else self._blocks(columns, rows)

    def _least_width(self, column: Sequence[str]) -> int:
        name, *values = map(cell_len, column)
        longest = max(values, default=0)
        return max(name, longest if self.wide or longest <= _SHORT else _LEAST)

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="")
        for name, *values in zip(columns, *rows, strict=True):
            is_short = max(map(cell_len, values), default=0) <= _SHORT
            table.add_column(self._text(name), no_wrap=is_short)
        for row in rows:
            table.add_row(*map(self._text, row))
        file = io.StringIO()
        console = Console(file=file, width=self.width, color_system=None, legacy_windows=False)
        console.print(table)
        return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())

    def _blocks(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """A block of lines for each row, without empty values."""
        label = max(map(len, columns)) + _GAP
        beside = self.width - label >= _BESIDE
        blocks = []
        for row in rows:
            lines = []
            for name, value in zip(columns, row, strict=True):
                if value and beside:
                    lines.append(f"{name:{label}}{self._fitted(value, self.width - label)}")
                elif value:
                    lines += [
                        self._fitted(name, self.width),
                        # A time fits into twenty cells.
                        f" {self._fitted(value, self.width - 1)}",
                    ]
            blocks.append("".join(f"{line}\n" for line in lines))
        return "\n".join(blocks)

    def _text(self, value: str) -> Text:
        # Text, not str, so that rich does not interpret markup and emoji codes.
        return Text(value, no_wrap=True, overflow=self.cut)

    def _fitted(self, value: str, width: int) -> str:
        text = self._text(value)
        text.truncate(_UNBOUNDED if self.wide else max(1, width), overflow=self.cut)
        return text.plain

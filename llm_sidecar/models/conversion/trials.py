"""The results that a conversion has tried: which one is kept, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llm_sidecar.models.conversion.quality import Measurement, Quality
from llm_sidecar.models.conversion.resources import shown

_HEADINGS: Final = (
    "weights",
    "size",
    "perplexity",
    "ratio",
    "equal tokens",
    "score ranks",
    "result",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One converted model.

    Attributes:
        name: how its weights are stored.
        size: of its files, in bytes.
        perplexity: of the shipped text.
        quality: against the source.
        refusal: why it is not kept, or None.
    """

    name: str
    size: int
    perplexity: float
    quality: Quality
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished conversion.

    Attributes:
        source_size: of the source's weights, in bytes.
        source: what was measured of the source.
        trials: in the order in which they were made; the last one is kept.
        fallback: whether the precision is another one than was asked for.
    """

    source_size: int
    source: Measurement
    trials: Sequence[Trial]
    fallback: bool

    @property
    def kept(self) -> Trial:
        """The result."""
        return self.trials[-1]

    def table(self) -> str:
        """The trials, one a line, for people."""
        rows: list[Sequence[str]] = [_HEADINGS]
        perplexity = f"{self.source.perplexity:.3f}"
        rows.append(("the source", shown(self.source_size), perplexity, "", "", "", ""))
        rows += [_row(trial) for trial in self.trials]
        return _aligned(rows)


def closest(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest perplexity."""
    return min(trials, key=lambda trial: trial.quality.perplexity_ratio)


def _row(trial: Trial) -> tuple[str, ...]:
    quality = trial.quality
    return (
        trial.name,
        shown(trial.size),
        f"{trial.perplexity:.3f}",
        f"{quality.perplexity_ratio:.3f}",
        f"{quality.equal_greedy:.3f}",
        f"{quality.score_ranks:.3f}",
        "kept" if trial.refusal is None else f"refused: {trial.refusal}",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False)]
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines)

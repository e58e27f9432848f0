"""Reads what `/metrics` says, for tests."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class MetricsText:
    """One scrape, or those of several servers together."""

    def __init__(self, *texts: str) -> None:
        self._families = [
            family for text in texts for family in text_string_to_metric_families(text)
        ]

    def samples(self, name: str, **labels: str) -> Iterator[Sample]:
        """The samples of that name that have these labels, and perhaps others."""
        for family in self._families:
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    yield sample

    def value(self, name: str, **labels: str) -> float:
        """The sum of these samples; a series that is not there is an error."""
        values = [sample.value for sample in self.samples(name, **labels)]
        assert values, f"there is no {name} with {labels}"
        return float(sum(values))

    def label_values(self, name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in self.samples(name)}

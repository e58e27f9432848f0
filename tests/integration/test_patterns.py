"""Regular expressions of adapters: matched as PEFT does, and never for longer than the bound."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from llm_sidecar.models import patterns
from llm_sidecar.models.patterns import PatternsFailed, first_matches

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10)
    for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj")
]
PATTERNS = [
    r"layers\.1\.self_attn\.o_proj",
    "o_proj",
    "layers.0.mlp.down_proj|nothing",
    "_proj",
    r"model\.layers\.\d\d\..*",
    ".*down.*",
]


def test_the_first_pattern_that_matches_is_the_one_that_peft_takes() -> None:
    found = first_matches(PATTERNS, NAMES)
    as_peft = [
        name if index is None else PATTERNS[index] for name, index in zip(NAMES, found, strict=True)
    ]
    assert as_peft == [get_pattern_key(PATTERNS, name) for name in NAMES]
    assert set(found) == {None, 0, 1, 2, 4, 5}


def test_without_patterns_none_matches() -> None:
    assert first_matches([], NAMES[:2]) == [None, None]


def test_a_lone_surrogate_matches_nothing() -> None:
    assert first_matches(["\ud800"], NAMES[:1]) == [None]


@pytest.mark.parametrize("pattern", ["(", "(" * 5000 + ")" * 5000, "a{2,1}"])
def test_what_is_no_regular_expression_is_said(pattern: str) -> None:
    with pytest.raises(PatternsFailed, match=r"^holds an invalid regular expression"):
        first_matches([pattern], NAMES)


def test_matching_ends_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(PatternsFailed, match=r"^cannot be matched within 0\.5 s$"):
        first_matches([r"((\w|\.)+)+!"], NAMES)

"""Ids of stream entries, and which entries a reader may have missed."""

from __future__ import annotations

from typing import Any

import pytest

from llm_sidecar.event_bus.followed_stream import BEGINNING, Entry, EntryId, Gap, _page_of


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1769853600123-0", (1769853600123, 0)),
        ("0-0", (0, 0)),
        ("007-1", (7, 1)),
        (f"{2**64 - 1}-{2**64 - 1}", (2**64 - 1, 2**64 - 1)),
    ],
)
def test_an_id_is_milliseconds_and_a_sequence(text: str, numbers: tuple[int, int]) -> None:
    assert EntryId.parse(text) == numbers


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "1-", "-1", "1-2-3", "1-2 ", " 1-2", "$", "+", "(1-0", "1.5-0", "٣-0", "1-+1"),
        *(f"{2**64}-0", f"0-{2**64}", "9" * 4301 + "-0"),
    ],
)
def test_anything_else_is_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="not the id of a stream entry"):
        EntryId.parse(text)


def test_ids_are_in_the_order_of_redis() -> None:
    assert EntryId(9, 5) < EntryId(10, 0) < EntryId(10, 2) < EntryId(10, 11)
    assert str(EntryId(10, 11)) == "10-11"


def info(first: str | None, last: str, length: int, added: int | None) -> dict[str, Any]:
    """What XINFO STREAM answers."""
    found: dict[str, Any] = {"length": length, "last-generated-id": last}
    found["first-entry"] = None if first is None else (first, {})
    return found if added is None else found | {"entries-added": added}


NEXT = Entry(EntryId(7, 0), {"type": "t"})


@pytest.mark.parametrize(
    ("found", "after", "gap_to", "position"),
    [
        # (XINFO STREAM, the reader's position, the end of a gap, the next position)
        (None, BEGINNING, None, BEGINNING),
        # The stream was deleted.
        (None, EntryId(5, 0), BEGINNING, BEGINNING),
        # Nothing new.
        (info("3-0", "5-0", 2, 9), EntryId(5, 0), None, EntryId(5, 0)),
        # Everything was removed, before or after it was read.
        (info(None, "5-0", 0, 9), EntryId(5, 0), None, EntryId(5, 0)),
        (info(None, "5-0", 0, 9), EntryId(4, 0), EntryId(5, 0), EntryId(5, 0)),
        # The stream was created again.
        (info("3-0", "5-0", 2, 2), EntryId(6, 0), EntryId(5, 0), EntryId(5, 0)),
    ],
)
def test_a_page_without_entries(
    found: dict[str, Any] | None, after: EntryId, gap_to: EntryId | None, position: EntryId
) -> None:
    gaps = [] if gap_to is None else [Gap(after, gap_to)]
    assert _page_of(found, [], after) == (gaps, position)


@pytest.mark.parametrize(
    ("found", "after", "has_gap"),
    [
        (info("3-0", "9-0", 3, 9), EntryId(3, 0), False),
        (info("3-0", "9-0", 3, 9), EntryId(2, 9), True),
        (info("3-0", "9-0", 3, 9), BEGINNING, True),
        # Nothing was ever removed.
        (info("3-0", "9-0", 3, 3), EntryId(2, 9), False),
        (info("3-0", "9-0", 3, 3), BEGINNING, False),
        # Redis 6.2 does not count.
        (info("3-0", "9-0", 3, None), EntryId(3, 0), False),
        (info("3-0", "9-0", 3, None), EntryId(2, 9), True),
    ],
)
def test_a_page_begins_with_a_gap_if_older_entries_were_removed(
    found: dict[str, Any], after: EntryId, has_gap: bool
) -> None:
    gaps = [Gap(after, EntryId(3, 0))] if has_gap else []
    assert _page_of(found, [NEXT], after) == ([*gaps, NEXT], NEXT.id)

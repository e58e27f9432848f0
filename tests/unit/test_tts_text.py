"""Splitting a text into the parts that are spoken one by one."""

from __future__ import annotations

import pytest

from llm_sidecar.tts.text import (
    MAX_PART,
    clauses,
    mark_of,
    pause_after,
    phrases,
    plain,
    speakable,
    split,
)
from llm_sidecar.tts.wording import spoken

LONG = " ".join(f"The position number {n} is up and its stop moves with it." for n in range(20))


def words(length: int, first: str = "A") -> str:
    """Words of `length` characters in all, without a stop or a comma."""
    text = first + " word" * ((length - len(first)) // 5)
    return text + "s" * (length - len(text))


def test_the_longest_part_has_280_characters() -> None:
    assert MAX_PART == 280


# What is spoken


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("a\x00b\x01c\x7f\x1b[d \ue000\ud800so\u00adft\u200b", "a b c  [d   soft"),
        ("\tfrom\there\t", "from here"),
        ("one\n\ntwo", "one\n\ntwo"),
        ("  \u202eKauf\u202c  ", "Kauf"),
        ("AAPL 182.40, 3.5 %", "AAPL 182.40, 3.5 %"),
        ("\uff15\uff0e\uff12\uff05 \u0661\u0662", "5.2% 12"),
    ],
)
def test_control_characters_are_spaces_and_invisible_ones_go(text: str, spoken: str) -> None:
    assert plain(text) == spoken


@pytest.mark.parametrize(
    ("text", "is_speakable"),
    [("a", True), ("7", True), ("... é", True), ("円", True), ("", False), (" ?!…☺", False)],
)
def test_a_letter_or_a_digit_can_be_spoken(text: str, is_speakable: bool) -> None:
    assert speakable(text) is is_speakable


# Sentences


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello there.", ["Hello there."]),
        ("Sell it. The trend is over!", ["Sell it.", "The trend is over!"]),
        ("Why? It fell.", ["Why?", "It fell."]),
        ("Out! It fell.", ["Out!", "It fell."]),
        ("Well… It fell.", ["Well…", "It fell."]),
        ("Wait... It fell.", ["Wait...", "It fell."]),
        ("売り。 Buy it.", ["売り。", "Buy it."]),
        (
            "It closed at 1.4. Then it fell.",
            ["It closed at one point four.", "Then it fell."],
        ),
        ("He said “Buy!” Then he left.", ["He said “Buy!”", "Then he left."]),
        ("(Sell.) Then (buy.)", ["(Sell.)", "Then (buy.)"]),
        ("It is *over.* Sell.", ["It is *over.*", "Sell."]),
        ("A heading\n\nAnd the text", ["A heading", "And the text"]),
        ("A heading\n \t\nAnd the text", ["A heading", "And the text"]),
        ("  Evened \n out  ", ["Evened out"]),
        ("Buy No. Then sell.", ["Buy No. Then sell."]),
        ("Buy Xp. Then sell.", ["Buy Xp.", "Then sell."]),
        # A list's number does not end a sentence; a number at the end of one does.
        ("1. Buy it now.", ["one. Buy it now."]),
        ("1. Buy it now", ["one. Buy it now"]),
        ("Sell it. 2. Buy it now.", ["Sell it.", "two. Buy it now."]),
        ("Sell it.” 2. Buy it now.", ["Sell it.”", "two. Buy it now."]),
        ("We sold 2. Buy it now.", ["We sold two.", "Buy it now."]),
        ("1000. Buy it now.", ["one thousand.", "Buy it now."]),
        ("", []),
        (" \n\t ", []),
        ("\x00\u200b", []),
    ],
)
def test_a_text_is_split_at_the_ends_of_sentences(text: str, parts: list[str]) -> None:
    assert split(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "Up 3 % vs. gold, e.g. to 6 now.",
        "BRK.B of Apple Inc. Or the U.S. Treasury, by Dr. Smith.",
        "It is (approx. The same) now.",
        "It is “Inc.” Or so.",
        "Say J. P. Morgan.",
        "Say $J. Morgan.",
        "wait... then buy",
        "Is it over? perhaps.",
        "It fell. - So we sold.",
        "It fell. -- So we sold.",
        "It fell. – So we sold.",
        "It fell. — So we sold.",
        "Without an end",
    ],
)
def test_a_dot_that_ends_no_sentence_does_not_split(text: str) -> None:
    assert split(text) == [spoken(text)]


@pytest.mark.parametrize("before", ["Sell it.", "Sell “it.”"])
def test_a_lists_number_stays_with_its_sentence_though_both_are_too_long(before: str) -> None:
    item = words(279)
    cut = item.rindex(" ", 0, 276)
    assert split(f"{before} 2. {item}") == [before, f"two. {item[:cut]}", item[cut + 1 :]]


# Long and short parts


def test_a_first_part_of_70_characters_is_whole_and_a_longer_one_ends_at_a_clause() -> None:
    clause, rest = words(30) + ",", "so " + words(36)
    assert len(f"{clause} {rest}") == 71
    assert split(f"{clause} {rest}") == [clause, rest]
    assert split(f"{clause} {rest[:-1]}") == [f"{clause} {rest[:-1]}"]


@pytest.mark.parametrize("mark", [",", ";", ":", "—", "–", "，", "；", "：", "、", ",”", ";)"])
def test_a_clause_ends_at_each_of_these(mark: str) -> None:
    # Without its end the clause would go on up to the limit.
    clause, rest = words(30) + mark, words(80)
    assert split(f"{clause} {rest}") == [clause, rest]


def test_a_first_sentence_without_a_clause_ends_at_a_word() -> None:
    text = words(200)
    first, rest = split(text)
    assert f"{first} {rest}" == text
    # The next word, of four characters, would make it longer than 70.
    assert 70 - 5 < len(first) <= 70


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        # The last of these words before the limit, which the part never exceeds.
        ("A word word to word word word word word word", "to word word word word word words."),
        ("A word word word word word word word word word word word word", "to word word words."),
        # A part that ends before such a word stays whole.
        ("A word word word word word to word word word word word word word word", "and the words."),
        # Of 16 words, the last two thirds begin after the first six.
        ("A word word word word word", "to word word word word word word word word words."),
        ("A word word word word to word word word word word word word word word", "words."),
        # None in the last two thirds.
        ("A to word word word word word word word word word word word word word", "words."),
    ],
)
def test_a_first_part_inside_a_clause_ends_before_a_short_word(first: str, rest: str) -> None:
    assert split(f"{first} {rest}") == [first, rest]


def test_a_later_sentence_of_280_characters_is_whole_and_a_longer_one_is_not() -> None:
    whole = words(279) + "."
    assert split(f"Sell. {whole}") == ["Sell.", whole]
    clause = words(100) + ","
    longer = f"{clause} {words(178, 'so')}."
    assert len(longer) == 281
    assert split(f"Sell. {longer}") == ["Sell.", clause, longer.removeprefix(clause).strip()]


def test_clauses_go_together_while_they_fit() -> None:
    clauses = [words(139) + ",", words(138) + ",", words(139) + ",", words(139) + "."]
    assert [len(clause) for clause in clauses] == [140, 139, 140, 140]
    # 140 and 139 and the space between them are 280; 140 and 140 are one too many.
    assert split("Sell. " + " ".join(clauses)) == [
        "Sell.",
        f"{clauses[0]} {clauses[1]}",
        clauses[2],
        clauses[3],
    ]


def test_a_long_first_sentence_goes_on_in_parts_of_280() -> None:
    clauses = [f"{words(49)},", *(f"{words(99)}," for _ in range(5))]
    first, second, third, fourth = split(" ".join(clauses))
    assert first == clauses[0]
    assert second == " ".join(clauses[1:3])
    assert third == " ".join(clauses[3:5])
    assert fourth == clauses[5]


def test_a_part_shorter_than_60_characters_takes_the_next_sentence_too() -> None:
    short, enough = words(58) + ".", words(59) + "."
    assert (len(short), len(enough)) == (59, 60)
    assert split(f"Sell. {short} Then buy.") == ["Sell.", f"{short} Then buy."]
    assert split(f"Sell. {enough} Then buy.") == ["Sell.", enough, "Then buy."]


def test_the_first_part_takes_no_other_sentence() -> None:
    assert split("One. Two. Three.") == ["One.", "Two. Three."]


def test_short_parts_join_up_to_280_characters() -> None:
    short = words(58) + "."
    fits, too_long = words(219) + ".", words(220) + "."
    assert split(f"Sell. {short} {fits}") == ["Sell.", f"{short} {fits}"]
    assert split(f"Sell. {short} {too_long}") == ["Sell.", short, too_long]


def test_a_word_longer_than_a_part_is_cut() -> None:
    assert split("q" * 700) == ["q" * 280, "q" * 280, "q" * 140]
    assert split("q" * 560) == ["q" * 280, "q" * 280]
    assert split(f"Up {'q' * 300} now") == ["Up", "q" * 280, f"{'q' * 20} now"]


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        "value 1,234.56 and BRK.B or ES=F; " * 60,
        "word " * 999,
        "One. Two. " * 300,
        "Ends in dots ... - and dashes — here: " * 40,
        "“Quoted?” (Yes.) No! " * 50,
    ],
)
def test_no_part_is_long_and_together_they_are_every_word(text: str) -> None:
    parts = split(text)
    assert max(map(len, parts)) <= MAX_PART
    assert " ".join(parts).split() == spoken(text).split()


def test_a_number_of_ten_thousand_digits_is_spoken_in_parts() -> None:
    parts = split("7" * 10_000)
    assert max(map(len, parts)) <= MAX_PART
    assert " ".join(parts).split() == ["seven"] * 10_000


def test_a_clause_of_a_longer_sentence_never_holds_half_a_word() -> None:
    sentence = ", ".join(["the stop moves up because the trend holds"] * 20)
    first, *rest = split(sentence)
    assert first == "the stop moves up because the trend holds,"
    assert all(part.endswith("holds,") for part in rest[:-1])


# Pauses


@pytest.mark.parametrize(
    ("part", "seconds"),
    [
        ("The end.", 0.3),
        ("The end.”", 0.3),
        ("The end!)", 0.3),
        ("The end?", 0.3),
        ("so far,", 0.12),
        ("so far;'", 0.12),
        ("so far —", 0.12),
        ("so", 0.0),
        ("", 0.0),
    ],
)
def test_a_pause_is_as_long_as_the_cut_is_deep(part: str, seconds: float) -> None:
    assert pause_after(part) == seconds


@pytest.mark.parametrize(
    ("part", "ends"),
    [
        ("Sell it, now. Then wait", ["Sell it,", "now.", "Then wait"]),
        (
            "In the U.S. as Dr. Smith says: “sell!” Then",
            ["In the U.S. as Dr. Smith says:", "“sell!”", "Then"],
        ),
        ("", []),
    ],
)
def test_the_clauses_of_a_part(part: str, ends: list[str]) -> None:
    assert clauses(part) == ends


@pytest.mark.parametrize(
    ("clause", "mark"), [("now.", "."), ("“sell!”", "!"), ("so —", "—"), ("so", ""), ("", "")]
)
def test_the_mark_of_a_clause(clause: str, mark: str) -> None:
    assert mark_of(clause) == mark


# Phrases


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (23, ["Sell it, now. Then wait"]),
        (22, ["Sell it, now.", "Then wait"]),
        (13, ["Sell it, now.", "Then wait"]),
        (12, ["Sell it,", "now.", "Then wait"]),
        # A clause is never split.
        (3, ["Sell it,", "now.", "Then wait"]),
    ],
)
def test_a_phrase_has_as_many_clauses_as_fit(limit: int, groups: list[str]) -> None:
    assert phrases("Sell it, now. Then wait", limit) == groups


def test_a_text_without_words_has_no_phrases() -> None:
    assert phrases(" ", 10) == []

"""Lessons as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoTokenizer,
)

from llm_sidecar import proposals
from llm_sidecar.engines import Message
from llm_sidecar.models.files import DEMO_DIR
from training.demo_models import lessons, proposal_lessons
from training.demo_models.cases import Case
from training.demo_models.situations import answer


def test_only_what_the_assistant_says_is_learned() -> None:
    tokenizer = load_tokenizer()
    messages = [
        Message(role="user", content="Long ABC"),
        Message(role="assistant", content='{"ticker":"ABC","action":"pass"}'),
    ]
    whole = lessons.encode(tokenizer, lessons.Lesson(messages))
    assert tokenizer.decode(whole.ids) == (
        '<|user|>\nLong ABC<|end|>\n<|assistant|>\n{"ticker":"ABC","action":"pass"}<|end|>'
    )
    learned = [label for label in whole.labels if label >= 0]
    assert tokenizer.decode(learned) == '{"ticker":"ABC","action":"pass"}<|end|>'
    head = lessons.encode(tokenizer, lessons.Lesson(messages, last=13))
    assert head.ids == whole.ids[: len(head.ids)]
    assert tokenizer.decode([label for label in head.labels if label >= 0]).startswith(
        '{"ticker":"AB'
    )
    assert tokenizer.eos_token_id not in head.labels


def test_hints_lead_from_each_token_to_where_the_prompt_has_it() -> None:
    tokenizer = load_tokenizer()
    case = Case(
        "We shorted QX.L, RSI 81.5 hot, ATR 3.2%",
        answer("overbought", "QX.L", "SHORT", "81.5", "3.2"),
        "overbought",
        ("RSI 81.5 hot",),
        atr="3.2",
    )
    text = proposals.dumps(case.proposal)
    messages = [Message(role="user", content=case.prompt), Message(role="assistant", content=text)]
    lesson = lessons.Lesson(messages, hints=proposal_lessons.hints(case, text))
    encoded = lessons.encode(tokenizer, lesson)

    def tokens(positions: Sequence[int]) -> str:
        return "".join(tokenizer.decode([encoded.ids[at]]) for at in positions)

    found = [
        (target.kind, tokens([target.position + 1]), tokens(target.sources))
        for target in encoded.attention_targets
    ]
    copied = [(predicted, attended) for kind, predicted, attended in found if kind == "copied"]
    # The first token and the one after the copy attend to where the word has been read.
    ticker = [("Q", "L,"), ("X", "X"), (".", "."), ("L", "L"), ('","', ",")]
    assert copied[: len(ticker)] == ticker
    assert [attended for _, attended in copied[len(ticker) :]] == ["5 hot", "1", ".", "5", " hot"]
    words = [
        (tokens([target.position]), tokens(target.sources))
        for target in encoded.attention_targets
        if target.kind == "word"
    ]
    assert {("L", "Q"), (",", "Q"), (" hot", "8")} <= set(words)
    reasons = {
        kind: {attended for other, _, attended in found if other == kind} for kind, _, _ in found
    }
    assert reasons["side"] == {" shorted "}
    assert reasons["situation"] == {"RSI 81.5 hot"}
    assert reasons["range"] == {"3.2"}
    assert {"side", "SHORT"} <= {tokens([at]) for at in encoded.decisions}


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")

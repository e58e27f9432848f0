"""The trade proposal: its schema, the prompt for Phi-3, and the guidance of the generation.

Two schemas describe it. `Proposal` is the public contract. `GUIDANCE` is a narrowing of it that
bounds every string and number and forbids free whitespace, so that guided decoding always produces
a valid proposal of bounded length, for any weights.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field

from llm_sidecar import grounding
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.input_model import InputModel
from llm_sidecar.models.base import Completion, GenerationRequest, Message

SYSTEM_PROMPT: Final = (
    "You review open trades. Answer with one JSON object: ticker; action adjust, pass or abort; "
    "side LONG or SHORT if known; new_stop_pct and new_target_pct, the distance from the current "
    "price in percent, or null; confidence from 0 to 1; rationale, one short sentence."
)


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class Proposal(InputModel):
    """The public schema of a proposal; see section 1 of the contract."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    ticker: str = Field(
        min_length=1, description="the symbol of the position, as traded", examples=["AAPL"]
    )
    action: Literal["adjust", "pass", "abort"] = Field(
        description="`adjust`: move the stop and the target; `pass`: leave the position as it is; "
        "`abort`: close the position",
        examples=["adjust"],
    )
    # Left out where the context states none; null is not a side.
    side: Literal["LONG", "SHORT"] = Field(
        default="LONG",
        validate_default=False,
        json_schema_extra=_without_default,
        description="the position's side: `LONG` gains when the price rises, `SHORT` when it "
        "falls; absent if the context does not say",
        examples=["LONG"],
    )
    new_stop_pct: float | None = Field(
        default=None,
        description="the distance of the new stop, in percent of the current price, away from it "
        "on the losing side; positive; null for no new stop",
        examples=[2.5],
    )
    new_target_pct: float | None = Field(
        default=None,
        description="the distance of the new target, in percent of the current price, away from "
        "it on the winning side; positive; null for no new target",
        examples=[4.0],
    )
    confidence: float = Field(
        ge=0.0,
        le=1.0,
        description="how sure the model is of the action: 0 is not at all, 1 is entirely",
        examples=[0.72],
    )
    rationale: str = Field(
        min_length=1,
        description="why, in one sentence",
        examples=["RSI at 78 calls for a tighter stop."],
    )


class Example(NamedTuple):
    """A few-shot example: the prompt of an earlier request and its corrected proposal.

    Attributes:
        feedback_id: of the correction, if it comes from feedback.
    """

    prompt: str
    proposal: dict[str, Any]
    feedback_id: str | None = None


class Proposed(NamedTuple):
    """A valid proposal.

    Attributes:
        completion: the completion that contains it.
        ungrounded: its ungrounded fields.
        request: the request that Phi-3 answered; None if an earlier attempt generated it.
        examples: the feedback_ids of the examples in the request, oldest first.
    """

    proposal: dict[str, Any]
    completion: Completion
    ungrounded: tuple[str, ...]
    request: GenerationRequest | None = None
    examples: tuple[str, ...] = ()

    @property
    def grounded(self) -> str:
        """`true`, or the ungrounded fields separated by commas."""
        return grounding.describe(self.ungrounded)


_TEXT: Final = "[A-Za-z,;:%$()/+' -]"
"""A character of a rationale outside of numbers."""
_SHORTEST_RATIONALE: Final = 10
_LONGEST_RATIONALE: Final = 109
_FIXED_TOKENS: Final = 74
"""Tokens of a proposal beside its rationale: one for each character of a ticker and of numbers, one
for the end of the turn, and the keys as forced tokens. The tokenizers of the demo models and of
SmolLM2 need at most 66. One that has only single characters needs more."""
_LONGEST: Final = {
    "ticker": "X" * 12,
    "action": "adjust",
    "side": "SHORT",
    "new_stop_pct": 99.99,
    "new_target_pct": 99.99,
    "confidence": 0.99,
    "rationale": "X" * _LONGEST_RATIONALE,
}
"""The longest guided proposal; 109 = 1 + 34 + 2 + 34 + 2 + 34 + 2 is the longest rationale."""
_MOST_OFFERED: Final = 64
"""Maximum number of tickers, and of numbers, in the guidance of a context, to keep it small."""

MAX_COMPLETION_TOKENS: Final = len(json.dumps(_LONGEST, separators=(",", ":"))) + 4
"""Maximum number of tokens of a guided proposal, for any tokenizer. It is ASCII, and a token is at
least one character. Two numbers may be `100.00` (one character more each), the confidence has at
most four characters, and the end of the turn is one token."""
MIN_COMPLETION_TOKENS: Final = 96
"""Minimum number of tokens that a request must allow for a proposal."""


def rationale_bound(max_tokens: int) -> int:
    """The maximum number of characters of a rationale in a completion of `max_tokens`.

    Each character may take a token. With `MIN_COMPLETION_TOKENS` or more, the longest proposal fits
    for every tokenizer that has tokens for the words of the keys, and with `MAX_COMPLETION_TOKENS`
    for any tokenizer.
    """
    bound = min(_LONGEST_RATIONALE, max_tokens - _FIXED_TOKENS)
    # Three parts of equal length; see `_rationale_pattern`.
    return bound - (bound - 7) % 3


def _rationale_pattern(bound: int) -> str:
    """One sentence of at most `bound` ASCII characters, with at most two decimal numbers in it.

    Without a decimal number it has at least eleven characters. The full stop is allowed inside a
    number and at the end only, and the end never follows a digit, so neither a second sentence nor
    half a number (`2.` for `2.5`) can be written.
    """
    char, decimal = r"[A-Za-z0-9,;:%$()/+' -]", r"\.[0-9]"
    part = (bound - 7) // 3
    body = "|".join(
        (
            f"{char}{{8,{bound - 3}}}",
            f"{char}{{0,{part + 2}}}{decimal}{char}{{0,{2 * part}}}",
            f"{char}{{0,{2 * part}}}{decimal}{char}{{0,{part + 2}}}",
            f"{char}{{0,{part}}}{decimal}{char}{{0,{part}}}{decimal}{char}{{0,{part}}}",
        )
    )
    return f"^[A-Z]({body})[A-Za-z%)]\\.$"


_PERCENT: Final = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 0.01},
        {"type": "null"},
    ]
}


def guidance(max_tokens: int) -> str:
    """The JSON schema (llguidance dialect) of proposals in at most `max_tokens` tokens.

    Its text depends on nothing else, because runtimes cache the compiled grammar by it.
    """
    return _guidance(rationale_bound(max_tokens))


@functools.cache
def _guidance(bound: int) -> str:
    return json.dumps(
        {
            "x-guidance": {"whitespace_flexible": False},
            "type": "object",
            "properties": {
                "ticker": {"type": "string", "pattern": "^[A-Z0-9^][A-Z0-9./=_-]{0,11}$"},
                "action": {"enum": ["adjust", "pass", "abort"]},
                "side": {"enum": ["LONG", "SHORT"]},
                "new_stop_pct": _PERCENT,
                "new_target_pct": _PERCENT,
                "confidence": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
                "rationale": {"type": "string", "pattern": _rationale_pattern(bound)},
            },
            "required": [
                "ticker",
                "action",
                "new_stop_pct",
                "new_target_pct",
                "confidence",
                "rationale",
            ],
            "additionalProperties": False,
        }
    )


GUIDANCE: Final = guidance(MAX_COMPLETION_TOKENS)
"""The guidance of the longest proposals."""


def is_grounded_guidance(text: str) -> bool:
    """Whether a guidance comes from `grounded_guidance`."""
    return "enum" in json.loads(text)["properties"]["ticker"]


def grounded_guidance(
    context: str, tickers: Sequence[str] = (), max_tokens: int = MAX_COMPLETION_TOKENS
) -> str | None:
    """`guidance` limited to the tickers and the numbers of a context.

    Every proposal under it is grounded, and no longer than under `guidance`. Distances and
    confidence are not limited; the rationale cannot quote them, as they are not known beforehand.

    Args:
        context: a prompt.
        tickers: tickers that the context is known to have; they come first.
        max_tokens: of the proposal.

    Returns:
        JSON schema text, or None if the context has no ticker.
    """
    tickers = list(dict.fromkeys((*tickers, *grounding.tickers_in(context, _MOST_OFFERED))))
    if not tickers:
        return None
    numbers = "|".join(map(re.escape, grounding.numbers_in(context, _MOST_OFFERED)))
    # Without text between them two numbers would read as a third one.
    body = f"{_TEXT}*(({numbers}){_TEXT}+)*({numbers})?" if numbers else f"{_TEXT}*"
    schema = json.loads(GUIDANCE)
    schema["properties"] |= {
        "ticker": {"enum": tickers},
        "rationale": {
            "type": "string",
            "pattern": f"^[A-Z]{body}[A-Za-z%)]\\.$",
            "minLength": _SHORTEST_RATIONALE,
            "maxLength": rationale_bound(max_tokens),
        },
    }
    return json.dumps(schema)


def is_valid(value: object) -> bool:
    """Whether a value is a proposal by the public schema."""
    try:
        Proposal.model_validate(value)
    except ValueError:
        return False
    return True


def in_order(proposal: dict[str, Any]) -> dict[str, Any]:
    """The proposal with its keys in the order in which the guidance has them written."""
    return {key: proposal[key] for key in Proposal.model_fields if key in proposal}


def dumps(proposal: dict[str, Any]) -> str:
    """The compact JSON text that the guidance produces, for prompts and for training."""
    return json.dumps(proposal, separators=(",", ":"))


def build_messages(prompt: str, examples: Sequence[Example] = ()) -> list[Message]:
    """The chat that asks Phi-3 for a proposal.

    The system prompt and the few-shot examples come first and change rarely, so an engine can
    keep their prefill; the market context is the last turn. An example's keys are in the order of
    the guidance, in whatever order a client sent them.
    """
    return [*opening(examples), {"role": "user", "content": prompt}]


def opening(examples: Sequence[Example]) -> list[Message]:
    """The turns before a market context: the system prompt and the few-shot examples."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for example in examples:
        messages.append({"role": "user", "content": example.prompt})
        messages.append({"role": "assistant", "content": dumps(in_order(example.proposal))})
    return messages


def prefix(examples: Sequence[Example], temperature: float) -> GenerationRequest:
    """The turns that every request for a proposal begins with, for prefill."""
    return GenerationRequest(opening(examples), MAX_COMPLETION_TOKENS, GUIDANCE, temperature)


def check_budget(max_tokens: int) -> None:
    """Raises InvalidRequest if `max_tokens` is less than `MIN_COMPLETION_TOKENS`."""
    if max_tokens < MIN_COMPLETION_TOKENS:
        raise InvalidRequest(
            f"a proposal needs {MIN_COMPLETION_TOKENS} tokens; send at least that",
            field="max_length",
        )


def parse(text: str) -> dict[str, Any]:
    """The proposal in a completion, with just the keys that were written.

    Raises:
        ValueError: the text is not a valid proposal.
    """
    return Proposal.model_validate_json(text).model_dump(exclude_unset=True)


def parse_guided(text: str, guidance: str) -> dict[str, Any]:
    """As `parse`, for a model that may have ignored its guidance.

    Args:
        text: the completion; order of the keys and whitespace are free.
        guidance: of the request; every value has to follow it.

    Raises:
        ValueError: the text is not a valid proposal, or does not follow the guidance.
    """
    # Imported here, because only models on other servers need llguidance in this process.
    from llm_sidecar.engines.llama_guidance import check_answer

    proposal = parse(text)
    try:
        check_answer(guidance, dumps(in_order(proposal)))
    except ModelUnavailable:
        raise ValueError("the proposal does not follow the guidance") from None
    return proposal

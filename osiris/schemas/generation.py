"""Prompts, generated text and proposals."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field

from llm_sidecar.proposals import MIN_COMPLETION_TOKENS, Proposal
from osiris.schemas import samples
from osiris.schemas.base import RequestBody

MAX_LENGTH: Final = 8192
"""Tokens."""

# The maximum length is a setting, and the tokenizer checks what fits the model's context.
Prompt = Annotated[str, Field(min_length=1, pattern=r"\S")]
ModelId = Literal["hermes", "phi3"]
MODEL_ID: Final = (
    "which model answers: `hermes` (free text) or `phi3` (a trade proposal); `hermes` unless given"
)


class PromptRequest(RequestBody):
    """A prompt for a model."""

    prompt: Prompt = Field(
        description="the market context, or a prompt for Hermes; not blank, and without control "
        "characters except tab, newline and carriage return",
        examples=[samples.PROMPT],
    )
    max_length: int = Field(
        256,
        ge=1,
        le=MAX_LENGTH,
        description="the maximum number of new tokens per model call",
        examples=[256],
    )


class ProposalRequest(PromptRequest):
    """A prompt for a trade proposal."""

    # Only the document has the minimum: a smaller number is refused with a sentence that says why.
    max_length: int = Field(
        256,
        ge=1,
        le=MAX_LENGTH,
        json_schema_extra={"minimum": MIN_COMPLETION_TOKENS},
        description="the maximum number of new tokens per model call; under 183, the rationale is "
        "limited so that the longest possible proposal fits",
        examples=[256],
    )


class GenerateRequest(PromptRequest):
    """A prompt, and the model that answers it; the query parameter `model_id` can also name it."""

    model_id: ModelId | None = Field(
        None, description=f"{MODEL_ID} here or in the query", examples=["phi3"]
    )


class GeneratedText(BaseModel):
    """Hermes' answer."""

    generated_text: str = Field(
        description="the new text, without the prompt", examples=["AAPL looks overbought."]
    )


class TradeAdjustment(BaseModel):
    """A proposal, and Hermes' critique of it."""

    transaction_id: uuid.UUID = Field(
        description="the id of the stored proposal; feedback refers to it",
        examples=[samples.TRANSACTION_ID],
    )
    phi3_proposal: Proposal = Field(description="Phi-3's proposal", examples=[samples.PROPOSAL])
    hermes_assessment: str = Field(
        description="Hermes' critique, in plain text; its score is in `X-Hermes-Score`",
        examples=["The tighter stop fits an overbought market."],
    )


class GenerationEvent(BaseModel):
    """One event of a generation."""

    event: Literal["token", "proposal", "assessment", "headers", "error", "done"] = Field(
        description="`token`: new text; `proposal`: Phi-3's proposal, complete and valid; "
        "`assessment`: Hermes' critique and score of it; `headers`: the headers of the answer "
        "without a stream; `error`: the generation has failed, and this is the last event; "
        "`done`: the answer without a stream, and the last event",
        examples=["token"],
    )
    data: str = Field(
        description="an object as JSON text: of a `token`, `text`, `model` (`phi3` or `hermes`), "
        "and `restart` (true) if this model begins again: discard its earlier text; "
        "of a `proposal`, the proposal; of an `assessment`, `text` and `score` (0 to 1); "
        "of `headers`, names and values; of an `error`, `detail`, `status` (of the answer without "
        "a stream), and, if there are any, `transaction_id` (of the stored proposal) and "
        "`retry_after` (seconds); of `done`, the answer without a stream",
        examples=['{"text":"{\\"ticker\\":\\"","model":"phi3"}'],
    )


EVENTS: Final[dict[str, Any]] = {
    "type": "string",
    "description": "With `Accept: text/event-stream`: server-sent events while the models "
    "generate. Comments keep the connection open.",
    "contentMediaType": "text/event-stream",
    "contentSchema": {"$ref": "#/components/schemas/GenerationEvent"},
    "examples": [
        'event: token\r\ndata: {"text":"AAPL looks","model":"hermes"}\r\n\r\n'
        'event: token\r\ndata: {"text":" overbought.","model":"hermes"}\r\n\r\n'
        'event: headers\r\ndata: {"X-Model":"hermes/hermes","X-Finish-Reason":"stop",'
        '"X-Prompt-Tokens":"31","X-Completion-Tokens":"6"}\r\n\r\n'
        'event: done\r\ndata: {"generated_text":"AAPL looks overbought."}\r\n\r\n'
    ],
}
"""OpenAPI's description of a generation's stream."""

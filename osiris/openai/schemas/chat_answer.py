"""Answers to chats."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from osiris.openai.schemas.chat import ToolCall
from osiris.openai.schemas.sampling import Usage


class TokenLogprob(BaseModel):
    """A token and the logarithm of its probability."""

    token: str = Field(description="the token as text", examples=["Hold"])
    logprob: float = Field(
        description="the natural logarithm of its probability, before temperature and guidance",
        examples=[-0.31],
    )
    bytes: list[int] = Field(description="its bytes", examples=[[72, 111, 108, 100]])


class ChosenLogprob(TokenLogprob):
    """A token of the answer."""

    top_logprobs: list[TokenLogprob] = Field(
        description="the most likely tokens at its position, most likely first",
        examples=[[{"token": "Hold", "logprob": -0.31, "bytes": [72, 111, 108, 100]}]],
    )


class ChoiceLogprobs(BaseModel):
    """The log probabilities of an answer."""

    content: list[ChosenLogprob] = Field(
        description="one entry for each token",
        examples=[
            [
                {
                    "token": "Hold",
                    "logprob": -0.31,
                    "bytes": [72, 111, 108, 100],
                    "top_logprobs": [],
                }
            ]
        ],
    )
    refusal: None = Field(None, description="always null", examples=[None])


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = Field(description="always `assistant`", examples=["assistant"])
    content: str | None = Field(
        description="the text; null if it is a call", examples=["Hold it until the earnings."]
    )
    refusal: None = Field(None, description="always null", examples=[None])
    tool_calls: list[ToolCall] = Field(
        [],
        description="the call; absent if there is none",
        examples=[
            [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "price_of", "arguments": '{"ticker":"AAPL"}'},
                }
            ]
        ],
    )


class Choice(BaseModel):
    """One answer."""

    index: int = Field(description="its number", examples=[0], ge=0)
    message: AnswerMessage = Field(
        description="the assistant's turn",
        examples=[{"role": "assistant", "content": "Hold it until the earnings.", "refusal": None}],
    )
    logprobs: ChoiceLogprobs | None = Field(
        None,
        description="the log probabilities of its tokens; null unless requested",
        examples=[None],
    )
    finish_reason: Literal["stop", "length", "tool_calls"] = Field(
        description="`stop`: it is complete; `length`: it was truncated by the maximum number of "
        "tokens or by the deadline of the request; `tool_calls`: it is a call",
        examples=["stop"],
    )


class ChatAnswer(BaseModel):
    """The answers to a chat."""

    id: str = Field(description="of this answer", examples=["chatcmpl-5f0c"])
    object: Literal["chat.completion"] = Field(
        description="always `chat.completion`", examples=["chat.completion"]
    )
    created: int = Field(description="when, in seconds since 1970", examples=[1769853600])
    model: str = Field(description="as the request names it", examples=["hermes"])
    choices: list[Choice] = Field(
        description="the answers",
        examples=[
            [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hold.", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ]
        ],
    )
    usage: Usage = Field(
        description="the numbers of tokens",
        examples=[
            {
                "prompt_tokens": 112,
                "completion_tokens": 41,
                "total_tokens": 153,
                "prompt_tokens_details": {"cached_tokens": 96},
            }
        ],
    )

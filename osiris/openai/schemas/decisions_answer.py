"""Answers to questions about an input: the answer of the Decisions API.

The fields are those of OpenAI's Python package 3.57 (`openai.types.decision`).
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, Field

_MASS: Final = (
    "not in OpenAI's API: the probability that the model answers with one of the options at all; "
    "the probabilities are normalised by it"
)
_RELIABLE: Final = (
    "not in OpenAI's API: `false` if the mass is below `MIN_ANSWER_MASS`: another answer is more "
    "likely, so do not use this one"
)
_CONFIDENCE: Final = (
    "how concentrated the probabilities are: 1 - entropy / log(number of options); not the "
    "probability that the answer is right"
)


class _Answer(BaseModel):
    name: str | None = Field(description="of the question", examples=["overbought"])


class _Measured(_Answer):
    answer_mass: float = Field(ge=0, le=1, description=_MASS, examples=[0.97])
    reliable: bool = Field(description=_RELIABLE, examples=[True])


class PredicateAnswer(_Measured):
    """The answer to a predicate."""

    type: Literal["predicate"] = Field(
        "predicate", description="always `predicate`", examples=["predicate"]
    )
    probability: float = Field(
        ge=0, le=1, description="that the statement is true", examples=[0.91]
    )


class ChoiceProbability(BaseModel):
    """An option and its probability."""

    value: str | bool = Field(description="the option", examples=["adjust"])
    probability: float = Field(ge=0, le=1, description="of the option", examples=[0.8])


class ChoiceAnswer(_Measured):
    """The answer to a choice."""

    type: Literal["choice"] = Field("choice", description="always `choice`", examples=["choice"])
    choice: str | bool = Field(description="the most likely option", examples=["adjust"])
    confidence: float = Field(ge=0, le=1, description=_CONFIDENCE, examples=[0.28])
    probabilities: list[ChoiceProbability] = Field(
        description="of all options, in their order",
        examples=[[{"value": "adjust", "probability": 0.8}, {"value": "pass", "probability": 0.2}]],
    )


class LevelProbability(BaseModel):
    """A level and its probability."""

    value: int = Field(ge=0, description="the index of the level, from 0", examples=[1])
    label: str = Field(description="the level", examples=["Good"])
    probability: float = Field(ge=0, le=1, description="of the level", examples=[0.8])


class ScoreAnswer(_Measured):
    """The answer to a score."""

    type: Literal["score"] = Field("score", description="always `score`", examples=["score"])
    score: float = Field(
        ge=0,
        description="the mean of the indexes of the levels, weighted by their probabilities",
        examples=[0.8],
    )
    confidence: float = Field(ge=0, le=1, description=_CONFIDENCE, examples=[0.28])
    probabilities: list[LevelProbability] = Field(
        description="of all levels, in their order",
        examples=[
            [
                {"value": 0, "label": "Poor", "probability": 0.2},
                {"value": 1, "label": "Good", "probability": 0.8},
            ]
        ],
    )


class RefusalAnswer(_Answer):
    """Every option has probability 0."""

    type: Literal["refusal"] = Field(
        "refusal", description="always `refusal`", examples=["refusal"]
    )


class DecisionInputDetails(BaseModel):
    """The cached part of the input."""

    cached_tokens: int = Field(
        description="input tokens that were not processed, because another prompt begins with them",
        examples=[96],
    )
    cache_write_tokens: int = Field(0, description="always 0", examples=[0])


class DecisionOutputDetails(BaseModel):
    """The parts of the output, always 0."""

    reasoning_tokens: int = Field(0, description="always 0", examples=[0])


class DecisionUsage(BaseModel):
    """The tokens of a request."""

    input_tokens: int = Field(
        description="tokens of all prompts: of each question with the input", examples=[128]
    )
    input_tokens_details: DecisionInputDetails = Field(
        description="what the cache saved",
        examples=[{"cached_tokens": 96, "cache_write_tokens": 0}],
    )
    output_tokens: int = Field(0, description="always 0: no text is generated", examples=[0])
    output_tokens_details: DecisionOutputDetails = Field(
        DecisionOutputDetails(reasoning_tokens=0),
        description="always the same",
        examples=[{"reasoning_tokens": 0}],
    )
    total_tokens: int = Field(description="the same as `input_tokens`", examples=[128])


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer


class Decision(BaseModel):
    """The answers to all questions."""

    model: str = Field(description="as in the request", examples=["hermes"])
    answers: list[Answer] = Field(
        description="in the order of the questions",
        examples=[
            [
                {
                    "type": "predicate",
                    "name": "overbought",
                    "probability": 0.91,
                    "answer_mass": 0.97,
                    "reliable": True,
                }
            ]
        ],
    )
    usage: DecisionUsage = Field(
        description="the tokens of the request",
        examples=[
            {
                "input_tokens": 128,
                "input_tokens_details": {"cached_tokens": 96, "cache_write_tokens": 0},
                "output_tokens": 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 128,
            }
        ],
    )

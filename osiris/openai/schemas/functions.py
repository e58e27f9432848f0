"""Functions that a model may call."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import OpenAIModel

NAME: Final = r"^[a-zA-Z0-9_-]{1,64}$"
"""A name of a function or of a format."""


class Function(OpenAIModel):
    """A function that the model may call."""

    name: str = Field(pattern=NAME, description="its name", examples=["price_of"])
    description: str | None = Field(
        None, description="what it does, for the model", examples=["The price of a stock."]
    )
    parameters: dict[str, Any] | None = Field(
        None,
        description="the JSON schema of its arguments, an object; null for none",
        examples=[{"type": "object", "properties": {"ticker": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None, description="has no effect: arguments always follow the schema", examples=[True]
    )

    @field_validator("parameters")
    @classmethod
    def _check_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise PydanticCustomError(
                "unsupported_value", "The type of the arguments should be object"
            )
        return value


class NamedTool(OpenAIModel):
    """The function that the model has to call."""

    type: Literal["function"] = Field(description="always `function`", examples=["function"])
    name: str = Field(description="the function", examples=["price_of"])

"""The list of models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Model(BaseModel):
    """A model, or an adapter of one."""

    id: str = Field(
        description="what `model` of a request names: `phi3`, `hermes`, or `phi3:` and the name of "
        "an adapter",
        examples=["phi3"],
    )
    object: Literal["model"] = Field("model", description="always `model`", examples=["model"])
    created: int = Field(
        description="when the files of an adapter changed, in seconds since 1970; 0 for a model",
        examples=[1769853600],
    )
    owned_by: str = Field("osiris", description="always the same", examples=["osiris"])
    parent: str | None = Field(
        None,
        description="the model that an adapter belongs to; null for a model",
        examples=["phi3"],
    )


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = Field("list", description="always `list`", examples=["list"])
    data: list[Model] = Field(
        description="phi3, hermes, and the adapters of phi3, newest first",
        examples=[
            [
                {
                    "id": "phi3",
                    "object": "model",
                    "created": 0,
                    "owned_by": "osiris",
                    "parent": None,
                }
            ]
        ],
    )

"""The prompts that a model was trained on, in `prompts.json` in its folder.

Such a model answers other prompts worse. A model without the file gets the sidecar's own prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_sidecar.errors import ModelUnavailable

PROMPTS_FILE: Final = "prompts.json"


class Prompts(BaseModel):
    """The texts that the sidecar puts around what Hermes judges.

    Attributes:
        system: the system message of every chat.
        critique_task, score_task: the last lines of the user's turn, after the proposal.
        score_start: how the assistant's turn begins, before the number; it can be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str = Field(min_length=1)
    critique_task: str = Field(min_length=1)
    score_task: str = Field(min_length=1)
    score_start: str


def read_prompts(folder: Path) -> Prompts | None:
    """The prompts in a model's folder; None if it has none.

    Raises:
        ModelUnavailable: the file cannot be read, or has other keys.
    """
    file = folder / PROMPTS_FILE
    if not file.is_file():
        return None
    try:
        return Prompts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise ModelUnavailable(
            f"{file} must contain exactly the texts {', '.join(Prompts.model_fields)}; "
            "correct it, or remove it to use the sidecar's own prompts"
        ) from None

"""The base of all request bodies."""

from __future__ import annotations

from pydantic import ConfigDict

from llm_sidecar.input_model import InputModel
from llm_sidecar.proposals import Proposal


class RequestBody(InputModel):
    """A request body: an object without unknown keys."""

    # No value is converted from another type: text is not a number, and 12.0 is not an integer.
    model_config = ConfigDict(extra="forbid", strict=True)

    known_keys = frozenset(Proposal.model_fields)

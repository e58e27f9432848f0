"""Normalises a chat to a form that every chat template accepts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llm_sidecar.models.base import Message


def served_form(messages: Sequence[Message]) -> list[Message]:
    """The chat in a form that every template accepts: one system turn, then alternating roles.

    The texts of system turns, and those of consecutive turns of one role, are joined by a blank
    line.
    """
    system = [one["content"] for one in messages if one["role"] == "system"]
    formed = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    others = (one for one in messages if one["role"] != "system")
    for role, turns in itertools.groupby(others, key=lambda one: one["role"]):
        formed.append({"role": role, "content": "\n\n".join(one["content"] for one in turns)})
    return formed


def with_system_text(messages: Sequence[Message], text: str) -> list[Message]:
    """The chat in its served form, with a text at the end of its system turn."""
    first = messages[0] if messages else None
    if first is None or first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = f"{first['content']}\n\n{text}"
    return [{"role": "system", "content": content}, *messages[1:]]

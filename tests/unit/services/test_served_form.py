"""The form of a chat that every chat template accepts."""

from __future__ import annotations

from llm_sidecar.models.base import Message
from llm_sidecar.services.served_form import served_form, with_system_text

CHAT: list[Message] = [{"role": "user", "content": "What now?"}]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def test_system_texts_are_joined_first_and_then_turns_of_one_role() -> None:
    chat = [
        user("a"),
        {"role": "system", "content": "s"},
        user("b"),
        {"role": "assistant", "content": "c"},
        {"role": "system", "content": "t"},
    ]
    formed = [
        {"role": "system", "content": "s\n\nt"},
        user("a\n\nb"),
        {"role": "assistant", "content": "c"},
    ]
    assert served_form(chat) == formed
    assert served_form(formed) == formed
    assert with_system_text(formed, "u")[0] == {"role": "system", "content": "s\n\nt\n\nu"}
    assert with_system_text(CHAT, "u") == [{"role": "system", "content": "u"}, *CHAT]
    assert with_system_text([], "u") == [{"role": "system", "content": "u"}]

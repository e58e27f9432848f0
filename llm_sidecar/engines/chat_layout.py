"""Renders the sidecar's chats with a model's own template, and adds what the template lacks.

    layout = ChatLayout(ChatTemplate(source, special_tokens))
    prompt = layout.render([{"role": "system", "content": "Judge."}, ...])

Templates differ: some have no system role, some drop the system text silently, some do not start
the assistant's turn, and some start it with a thought. Each template is tried once with texts that
are easy to find again, so no list of known models is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llm_sidecar.engines.base import Message
from llm_sidecar.engines.chat_template import ChatTemplate
from llm_sidecar.errors import ModelUnavailable

_TEXTS: Final = {"system": "Text-A1", "user": "Text-B2", "assistant": "Text-C3"}
_SERVED: Final = (
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
"""The chats that every model must take: a task, and a task after few-shot examples."""
_THOUGHTS: Final = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
"""How models begin and end a thought."""
_THOUGHT_NOTE: Final = "the chat template begins a thought: it is closed before the answer"
_HEADER_NOTE: Final = "the chat template does not begin the assistant's turn: its header is added"
_SYSTEM_NOTE: Final = (
    "the chat template has no system role: the system text begins the first user turn"
)


class ChatLayout:
    """Renders prompts that end where the assistant's answer starts or continues.

    Attributes:
        header: what follows the last user's text in a prompt.
        gap: white space that the template writes between a prompt and the assistant's text.
        turn_end: what the template writes after the assistant's text.
        notes: where prompts deviate from the template, one sentence each.
        prompts: the chats that the template was tried with, as text.
        literals: see `ChatTemplate`.
    """

    def __init__(self, template: ChatTemplate) -> None:
        """Tries the template.

        Raises:
            ModelUnavailable: it refuses the sidecar's chats, loses their texts, or does not mark
                where the user's text ends.
        """
        self._template = template
        self.literals = template.literals
        self._has_system_role = _keeps_system_text(template)
        before, self.turn_end = _around_answer(template)
        prompt = template.render(_chat(["user"]))
        self._start, self.gap, self.notes = _start_of_answer(prompt, before)
        self.prompts = [self.render(_chat(roles)) for roles in _SERVED]
        for roles, prompt in zip(_SERVED, self.prompts, strict=True):
            _check_texts(roles, prompt)
        self.header = self.prompts[0].rpartition(_TEXTS["user"])[2]
        if not self.header.strip():
            raise _unusable("does not mark where the user's text ends")
        if not self._has_system_role:
            self.notes += (_SYSTEM_NOTE,)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the assistant's next turn, or for the rest of the last turn if that is the
        assistant's.

        Raises:
            ModelUnavailable: the template refuses the chat.
        """
        start = self.answer_start(messages)
        if start:
            messages = messages[:-1]
        if not self._has_system_role:
            messages = _without_system_role(messages)
        return self._template.render(messages) + self._start + start

    def answer_start(self, messages: Sequence[Message]) -> str:
        """The start of the answer, if the chat has one as its last turn, with the white space
        before it; else empty."""
        last = messages[-1] if messages else None
        return self.gap + last["content"] if last and last["role"] == "assistant" else ""


def _chat(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": _TEXTS[role]} for role in roles]


def _keeps_system_text(template: ChatTemplate) -> bool:
    for roles in _SERVED:
        try:
            text = template.render(_chat(roles))
        except ModelUnavailable:
            return False
        if "system" in roles and _TEXTS["system"] not in text:
            return False
    return True


def _without_system_role(messages: Sequence[Message]) -> Sequence[Message]:
    """The chat with its system text at the beginning of the first user turn."""
    if len(messages) < 2 or [one["role"] for one in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others]


def _around_answer(template: ChatTemplate) -> tuple[str, str]:
    """The text before and after the answer that ends a chat; empty if the answer is not found."""
    try:
        whole = template.render(_chat(["user", "assistant"]), header=False)
    except ModelUnavailable:
        return "", ""
    before, answer, after = whole.partition(_TEXTS["assistant"])
    return (before, after) if answer else ("", "")


def _start_of_answer(prompt: str, before: str) -> tuple[str, str, tuple[str, ...]]:
    """What has to follow the template's prompt so that an answer can begin.

    The template itself shows it: what it writes before an answer belongs to the prompt. White space
    alone is left to the model, as transformers does.

    Args:
        prompt: a chat whose answer comes next.
        before: the text before the answer, in the same chat with an answer.

    Returns:
        the text to add to a prompt, the white space before an answer, and a note if text is added.
    """
    start = before[len(prompt) :] if before.startswith(prompt) else ""
    closing = _open_thought(prompt.rpartition(_TEXTS["user"])[2])
    if closing is not None:
        return start if closing in start else f"\n{closing}\n\n", "", (_THOUGHT_NOTE,)
    return (start, "", (_HEADER_NOTE,)) if start.strip() else ("", start, ())


def _open_thought(header: str) -> str | None:
    """The tag that closes the thought which a header opens; None if no thought stays open."""
    for opening, closing in _THOUGHTS.items():
        if header.rfind(opening) > header.rfind(closing):
            return closing
    return None


def _check_texts(roles: Sequence[str], prompt: str) -> None:
    """Checks that a prompt holds the texts of all turns, those of user and assistant in order."""
    if "system" in roles and _TEXTS["system"] not in prompt:
        raise _unusable("leaves out the system text")
    position = 0
    for role in roles:
        if role != "system":
            found = prompt.find(_TEXTS[role], position)
            if found < 0:
                raise _unusable(f"leaves out the text of the {role}")
            position = found + len(_TEXTS[role])


def _unusable(problem: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"the model's chat template {problem}; set another template in the model's folder"
    )

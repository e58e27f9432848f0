"""Free questions to Hermes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from llm_sidecar import hermes_plugin
from llm_sidecar.models.base import ChatModel, Delta, GenerationRequest


class Chat:
    """Asks Hermes anything."""

    def __init__(self, hermes: ChatModel, temperature: float) -> None:
        """Asks nothing.

        Args:
            hermes: the model.
            temperature: 0 is greedy.
        """
        self._hermes = hermes
        self._temperature = temperature

    def answer(self, prompt: str, max_tokens: int) -> AsyncGenerator[Delta, None]:
        """Hermes' answer; at the model's own deadline it ends with the text so far.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        messages = hermes_plugin.chat_messages(prompt)
        request = GenerationRequest(messages, max_tokens, temperature=self._temperature)
        return self._hermes.stream(request, allow_partial=True)

"""Free-text chat with Hermes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from llm_sidecar import hermes_plugin
from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import ChatModel, Delta, GenerationRequest
from llm_sidecar.models.prompts import Prompts


class Chat:
    """Generates Hermes' answers to free-text prompts."""

    def __init__(self, hermes: ChatModel, temperature: float | None, prompts: Prompts) -> None:
        """Calls no model yet.

        Args:
            hermes: the model.
            temperature: 0 is greedy, None the model's own sampling.
            prompts: for the model.
        """
        self._hermes = hermes
        self._temperature = temperature
        self._system = prompts.system

    def answer(
        self, prompt: str, max_tokens: int, deadline: Deadline
    ) -> AsyncGenerator[Delta, None]:
        """Streams Hermes' answer; at the deadline it ends with the text so far.

        Args:
            prompt: the user's turn.
            max_tokens: of the answer.
            deadline: of the request.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        messages = hermes_plugin.chat_messages(prompt, self._system)
        request = GenerationRequest(messages, max_tokens, temperature=self._temperature)
        return self._hermes.stream(request, deadline, allow_partial=True)

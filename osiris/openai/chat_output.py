"""Answers of `/v1/chat/completions`: a whole one, or the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_sidecar.models.base import TokenLogprob
from llm_sidecar.services.conversation import Finished, Part, TextPart, ToolCallPart
from osiris.openai.answers import new_head, usage
from osiris.openai.logprobs import chat_logprobs


@dataclass(slots=True)
class ChatChoice:
    """One choice of a whole answer, from its parts."""

    with_logprobs: bool
    finished: Finished | None = None
    _texts: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _call: dict[str, Any] | None = None

    def add(self, part: Part) -> None:
        """Adds the next part."""
        if isinstance(part, TextPart):
            self._texts.append(part.text)
            self._logprobs.extend(part.logprobs)
        elif isinstance(part, Finished):
            self.finished = part
        elif self._call is None:
            self._call = _call(part)
        else:
            self._call["function"]["arguments"] += part.arguments

    def shown(self, index: int) -> dict[str, Any]:
        """The choice as JSON."""
        assert self.finished is not None
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if self._call is None:
            message["content"] = "".join(self._texts)
        else:
            message["tool_calls"] = [self._call]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._logprobs) if self.with_logprobs else None,
            "finish_reason": self.finished.reason,
        }


def whole_answer(model: str, choices: Sequence[ChatChoice]) -> dict[str, Any]:
    """The answer with these finished choices."""
    return {
        **new_head("chatcmpl", "chat.completion", model),
        "choices": [choice.shown(index) for index, choice in enumerate(choices)],
        "usage": usage([one.finished for one in choices if one.finished is not None]),
    }


class ChatChunks:
    """The chunks of a stream, in order."""

    def __init__(self, model: str, *, with_logprobs: bool, with_usage: bool) -> None:
        """Begins an answer.

        Args:
            model: as the request names it.
            with_logprobs: whether chunks of text have log probabilities.
            with_usage: whether the last chunk has the numbers of tokens.
        """
        self._head = new_head("chatcmpl", "chat.completion.chunk", model)
        self._with_logprobs = with_logprobs
        self._with_usage = with_usage
        self._begun: set[int] = set()
        self._finished: dict[int, Finished] = {}

    def of(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """The chunks of the next part of a choice; its first chunk has the role."""
        if index not in self._begun:
            self._begun.add(index)
            content = None if isinstance(part, ToolCallPart) else ""
            role = {"role": "assistant", "content": content, "refusal": None}
            yield self._chunk(index, role)
            first = True
        else:
            first = False
        if isinstance(part, Finished):
            self._finished[index] = part
            yield self._chunk(index, {}, finish_reason=part.reason)
        elif isinstance(part, TextPart):
            logprobs = chat_logprobs(part.logprobs) if self._with_logprobs else None
            yield self._chunk(index, {"content": part.text}, logprobs)
        else:
            call = _call(part) if first else {"function": {"arguments": part.arguments}}
            yield self._chunk(index, {"tool_calls": [{"index": part.index, **call}]})

    def end(self) -> Iterator[dict[str, Any]]:
        """The chunk with the usage after all choices, if it is wanted."""
        if self._with_usage:
            finished = [self._finished[index] for index in sorted(self._finished)]
            yield {**self._head, "choices": [], "usage": usage(finished)}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._with_usage else chunk


def _call(part: ToolCallPart) -> dict[str, Any]:
    return {
        "id": part.call_id,
        "type": "function",
        "function": {"name": part.name, "arguments": part.arguments},
    }

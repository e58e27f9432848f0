"""Chats as tokens for models in onnxruntime-genai's format, by its own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime_genai as og

from llm_sidecar.engines.base import AnswerTree, Message, SpecialTokens


class ChatTokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        tokenizer: the runtime's.
        ends: tokens that end a turn.
    """

    def __init__(self, folder: Path) -> None:
        """Reads them from `folder`."""
        self.tokenizer = og.Tokenizer(str(folder))
        self.ends = frozenset(int(token) for token in self.tokenizer.eos_token_ids)
        self._special = SpecialTokens(folder)
        self._answer_trees: dict[tuple[str, ...], AnswerTree] = {}

    def encode(self, messages: Sequence[Message], header: bool = True) -> list[int]:
        """The chat's tokens, with the header of the assistant's turn or without."""
        text = self.tokenizer.apply_chat_template(
            json.dumps(self._special.neutralise(messages)), add_generation_prompt=header
        )
        tokens: list[int] = self.tokenizer.encode(text).tolist()
        return tokens

    def decoder(self) -> Callable[[int], str]:
        """The text that each token adds to those before it."""
        decode: Callable[[int], str] = self.tokenizer.create_stream().decode
        return decode

    def answer_tree(self, answers: tuple[str, ...]) -> AnswerTree:
        """The answers as the assistant's turn would begin with them."""
        if answers not in self._answer_trees:
            turn = json.dumps([{"role": "user", "content": "?"}])
            apply = self.tokenizer.apply_chat_template
            with_header = apply(turn, add_generation_prompt=True)
            header = with_header[len(apply(turn, add_generation_prompt=False)) :]
            skip = len(self.tokenizer.encode(header))
            encoded = {
                answer: [int(t) for t in self.tokenizer.encode(header + answer)[skip:]]
                for answer in answers
            }
            self._answer_trees[answers] = AnswerTree(encoded)
        return self._answer_trees[answers]

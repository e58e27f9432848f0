"""The text of a critique: whole sentences, at most three."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Final

from llm_sidecar.models.base import Delta
from llm_sidecar.sentences import sentence_end

Deltas = AsyncGenerator[Delta, None]

SENTENCES: Final = 3


async def whole_sentences(stream: Deltas) -> Deltas:
    """Ends a generation after its third sentence, with the finish reason `stop`.

    Text is passed on sentence by sentence. If the token bound cuts a sentence (finish reason
    `length`), only the whole sentences before it are passed on, because half of one can say the
    opposite. If there is none, the cut one is passed on and ends with an ellipsis.

    Args:
        stream: of a model; closed at the end.
    """
    text, passed, count = "", 0, 0
    async with contextlib.aclosing(stream):
        async for delta in stream:
            text += delta.text
            complete, cut = delta.finish_reason is not None, delta.finish_reason == "length"
            begin = passed
            while count < SENTENCES and (
                end := sentence_end(text, passed, complete=complete, cut=cut)
            ):
                passed, count = end, count + 1
            if count == SENTENCES:
                yield replace(delta, text=text[begin:passed], finish_reason="stop")
                return
            rest = text[passed:].rstrip() if complete else ""
            if cut and rest:
                rest = "" if count else f"{rest}…"
            yield replace(delta, text=text[begin:passed] + rest)

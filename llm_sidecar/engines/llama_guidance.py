"""The guidance of a completion on llama.cpp.

The guidance of proposals becomes a grammar of llama.cpp. Any other schema is sent unchanged: the
`xllamacpp` wheel has llguidance, and a llama-server without it converts the schema itself, with
free whitespace and not always exactly. So an answer to such a schema is checked.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Final

from llm_sidecar.engines.answer_check import follows
from llm_sidecar.engines.gbnf import to_gbnf
from llm_sidecar.errors import ModelUnavailable

_KEPT: Final = 32


@functools.lru_cache(_KEPT)
def grammar_of(schema: str) -> str | None:
    """The grammar of a schema; None if llama.cpp must take the schema itself."""
    try:
        return to_gbnf(schema)
    except ValueError:
        return None


def guidance_fields(schema: str) -> dict[str, Any]:
    """The guidance fields of a completion request."""
    grammar = grammar_of(schema)
    return {"json_schema": json.loads(schema)} if grammar is None else {"grammar": grammar}


def check_answer(schema: str, answer: str) -> None:
    """Raises ModelUnavailable unless a finished answer follows its schema."""
    if not follows(schema, answer):
        raise ModelUnavailable(
            "llama.cpp's answer does not follow its JSON schema; the wheel xllamacpp follows every "
            "schema exactly"
        )

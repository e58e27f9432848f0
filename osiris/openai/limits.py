"""The length of what a request sends, which MAX_PROMPT_CHARS bounds."""

from __future__ import annotations

import json

from osiris.openai.errors import bad_field


def check_chars(param: str, chars: int, max_chars: int) -> None:
    """Raises RequestValidationError if a field has more than MAX_PROMPT_CHARS characters."""
    if chars > max_chars:
        raise bad_field(
            param,
            f"Text is too long; MAX_PROMPT_CHARS takes {max_chars} characters",
            "string_too_long",
        )


def check_json(param: str, value: object, max_chars: int) -> None:
    """Raises RequestValidationError if a value has more characters as JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    check_chars(param, len(text), max_chars)

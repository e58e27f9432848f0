"""The strings that models, the database, exports and events accept: text.

Text is Unicode scalar values without control characters (general category Cc) other than tab,
newline and carriage return. Bidirectional marks and unassigned characters are text. The greatest
length is a setting, MAX_PROMPT_CHARS, so it is checked separately.

A fault quotes nothing of the value: no character, and no key that a caller made up. The models in
`llm_sidecar.input_model` check input from outside.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

from llm_sidecar.errors import InvalidRequest

_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_FIRST_SURROGATE: Final = "\ud800"
_REPLACEMENT: Final = "\ufffd"

CALLERS_KEY: Final = "*"
"""Replaces, in a location, a key that a caller invented."""
MAX_DEPTH: Final = 64
"""Maximum number of levels of an object, because serialising it as JSON recurses as deep."""
MAX_VALUES: Final = 1 << 15
"""Maximum number of values of an object, over all levels."""
_MAX_INTEGER_BITS: Final = 14_000
"""About 4,200 digits; Python refuses to write an integer of more than 4,300."""

Location = tuple[str | int, ...]


class Fault(NamedTuple):
    """What is wrong with a value, and where: a path of keys and indexes."""

    kind: str
    message: str
    location: Location = ()


def find_fault(value: object, known_keys: Collection[str] = ()) -> Fault | None:
    """A fault of a value from outside, or None: a string that is not text, or a nested value that
    is not JSON.

    Args:
        value: a string, an object or a list as `json.loads` gives them; anything else has no fault.
        known_keys: keys that a schema defines, so that a location may show them.
    """
    if isinstance(value, str):
        return _text_fault(value)
    if isinstance(value, bytes | bytearray):
        # pydantic would decode them.
        return Fault("string_type", "Input should be a valid string")
    containers: list[tuple[Location, Any]] = []
    if isinstance(value, Mapping):
        containers.append(((), dict(value)))
    elif isinstance(value, list | tuple):
        containers.append(((), value))
    values = 0
    # The list grows during the loop: without recursion no depth is too much.
    for location, container in containers:
        values += len(container)
        if len(location) >= MAX_DEPTH:
            return Fault("too_deep", f"Object should be nested at most {MAX_DEPTH} deep")
        if values > MAX_VALUES:
            return Fault("too_many_values", f"Object should hold at most {MAX_VALUES} values")
        is_object = isinstance(container, dict)
        for key, inner in container.items() if is_object else enumerate(container):
            fault = (_key_fault(key) if is_object else None) or _value_fault(inner)
            nested = isinstance(inner, dict | list | tuple)
            if fault or nested:
                shown = key if not is_object or key in known_keys else CALLERS_KEY
                here = (*location, shown)
                if fault:
                    return fault._replace(location=here)
                containers.append((here, inner))
    return None


def find_length_fault(value: object, max_chars: int) -> Fault | None:
    """The fault of a text, or of an object as JSON, that has more than `max_chars` characters.

    Args:
        value: a value without a fault by `find_fault`.
    """
    if isinstance(value, str) and len(value) > max_chars:
        return Fault(
            "string_too_long", f"Text is too long; MAX_PROMPT_CHARS takes {max_chars} characters"
        )
    # Not escaped, so that the limit is the same for every script.
    if (
        isinstance(value, dict | list | tuple)
        and len(json.dumps(value, ensure_ascii=False, separators=(",", ":"))) > max_chars
    ):
        return Fault(
            "object_too_long",
            f"Object is too long; MAX_PROMPT_CHARS takes {max_chars} characters of JSON",
        )
    return None


def require_text(max_chars: int, **values: object) -> None:
    """Checks that arguments are texts or objects of at most `max_chars` characters.

    Raises:
        InvalidRequest: names the argument.
    """
    for name, value in values.items():
        if fault := find_fault(value) or find_length_fault(value, max_chars):
            where = ".".join(map(str, (name, *fault.location)))
            raise InvalidRequest(f"{where}: {fault.message}")


def cleaned(text: str) -> str:
    """The text with U+FFFD for each forbidden character: a model's output cannot be refused."""
    return _FORBIDDEN.sub(_REPLACEMENT, text)


def _text_fault(text: str) -> Fault | None:
    found = _FORBIDDEN.search(text)
    if found is None:
        return None
    position = f"its character {found.start() + 1}"
    if found[0] >= _FIRST_SURROGATE:
        return Fault("text_unicode", f"Text should be Unicode; {position} is half a surrogate pair")
    return Fault(
        "text_control",
        "Text should have no control characters but tab, newline and carriage return; "
        f"{position} is one",
    )


def _key_fault(key: object) -> Fault | None:
    if not isinstance(key, str):
        return Fault("not_json", "Keys of an object should be text")
    fault = _text_fault(key)
    return fault and fault._replace(message=f"Key: {fault.message}")


def _value_fault(value: object) -> Fault | None:
    if isinstance(value, str):
        return _text_fault(value)
    if isinstance(value, float):
        finite = math.isfinite(value)
        return None if finite else Fault("finite_number", "Number should be finite")
    if isinstance(value, int):
        short = value.bit_length() <= _MAX_INTEGER_BITS
        return None if short else Fault("integer_too_long", "Integer has too many digits")
    if value is None or isinstance(value, dict | list | tuple):
        return None
    return Fault("not_json", "Value should be JSON")

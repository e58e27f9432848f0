"""instructor against the sidecar: answers of the client's own types."""

from __future__ import annotations

import instructor
import pytest
from openai import OpenAI

from tests.clients.sidecar import KEY, MESSAGES, Position

# Mode.JSON sends the schema as text, which the demo model does not follow.
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


def patched(url: str, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=url, api_key=KEY, max_retries=0), mode=mode)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_an_answer_has_the_clients_type(url: str, mode: instructor.Mode) -> None:
    position = patched(url, mode).chat.completions.create(
        model="hermes",
        messages=MESSAGES,
        response_model=Position,
        max_tokens=96,
        max_retries=0,
    )
    assert isinstance(position, Position)


@pytest.mark.parametrize(
    "mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.value
)
def test_the_last_part_of_a_stream_is_the_whole_answer(url: str, mode: instructor.Mode) -> None:
    parts = list(
        patched(url, mode).chat.completions.create_partial(
            model="hermes", messages=MESSAGES, response_model=Position, max_tokens=96
        )
    )
    assert len(parts) > 1
    Position.model_validate(parts[-1].model_dump())

"""`/v1/decisions`: requests as OpenAI's client sends them, and the answers that it reads."""

from __future__ import annotations

from typing import Any, cast

import httpx
import pytest

from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, QueueFull
from llm_sidecar.models.base import ChoiceScores
from osiris.openai.schemas.decisions import MAX_QUESTIONS
from tests.unit.fakes import FakeSidecar

SURE = ChoiceScores({"True": 0.75, "False": 0.25}, 40, 8)
PREDICATE: dict[str, Any] = {"type": "predicate", "instructions": "It is long."}
CHOICE: dict[str, Any] = {
    "type": "choice",
    "name": "next",
    "instructions": "What to do?",
    "choices": [{"value": "true", "description": "Yes."}, {"value": True}],
}
SCORE: dict[str, Any] = {
    "type": "score",
    "instructions": "How good is it?",
    "levels": [{"label": "Poor"}, {"label": "Good", "description": "No doubt."}],
}


def body(*questions: dict[str, Any], given: Any = "Long ABC.", **more: Any) -> dict[str, Any]:
    return {"model": "hermes", "input": given, "questions": [*questions] or [PREDICATE], **more}


def first_chat(fake_sidecar: FakeSidecar) -> list[dict[str, str]]:
    """The chat that asked the first question."""
    messages, _ = cast(Any, fake_sidecar.hermes.requests[0])
    return list(messages)


def user_turn(fake_sidecar: FakeSidecar) -> str:
    """What the model was asked first."""
    return first_chat(fake_sidecar)[1]["content"]


async def test_each_question_has_its_answer(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [
        SURE,
        ChoiceScores({"1": 0.0625, "2": 0.1875}, 50, 30),
        ChoiceScores({"0": 0.25, "1": 0.75}, 60, 30),
    ]
    response = await asking.post("/v1/decisions", json=body(PREDICATE, CHOICE, SCORE))
    assert response.status_code == 200
    answers = response.json().pop("answers")
    confidence = pytest.approx(0.18872187554086717)
    assert answers == [
        {
            "type": "predicate",
            "name": None,
            "probability": 0.75,
            "answer_mass": 1.0,
            "reliable": True,
        },
        {
            "type": "choice",
            "name": "next",
            "choice": True,
            "confidence": confidence,
            "probabilities": [
                {"value": "true", "probability": 0.25},
                {"value": True, "probability": 0.75},
            ],
            "answer_mass": 0.25,
            "reliable": False,
        },
        {
            "type": "score",
            "name": None,
            "score": 0.75,
            "confidence": confidence,
            "probabilities": [
                {"value": 0, "label": "Poor", "probability": 0.25},
                {"value": 1, "label": "Good", "probability": 0.75},
            ],
            "answer_mass": 1.0,
            "reliable": True,
        },
    ]
    assert response.json() == {
        "model": "hermes",
        "answers": answers,
        "usage": {
            "input_tokens": 150,
            "input_tokens_details": {"cached_tokens": 68, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 150,
        },
    }


async def test_a_string_and_a_boolean_look_different_to_the_model(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [ChoiceScores({"1": 0.5, "2": 0.5})]
    await asking.post("/v1/decisions", json=body(CHOICE))
    assert '1: "true" - Yes.\n2: true\n' in user_turn(fake_sidecar)


async def test_a_question_without_any_probability_is_refused_and_the_others_are_answered(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [ChoiceScores({"1": 0.0, "2": 0.0}), SURE]
    response = await asking.post("/v1/decisions", json=body(CHOICE, PREDICATE))
    refusal, answer = response.json()["answers"]
    assert refusal == {"type": "refusal", "name": "next"}
    assert answer["type"] == "predicate"


# The input


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("Long ABC.", "Long ABC."),
        ([{"role": "user", "content": "Long ABC."}], "Long ABC."),
        (
            [
                {"type": "message", "role": "user", "content": "One."},
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Two."},
                        {"type": "input_json", "data": {"rsi": 81, "é": [None]}},
                        {"type": "input_json", "data": [{"a": 1}]},
                    ],
                },
            ],
            'One.\n\nTwo.\n{"rsi":81,"é":[null]}\n[{"a":1}]',
        ),
        (
            [
                {"role": "user", "content": 'Hi.\n{"role":"assistant"}'},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
            ],
            '{"role":"user","content":"Hi.\\n{\\"role\\":\\"assistant\\"}"}\n'
            '{"role":"assistant","content":"No."}\n{"role":"assistant","content":"Yes."}',
        ),
        (
            [
                {"type": "function_call", "call_id": "c1", "name": "quote", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "112.5"},
                {"type": "custom_tool_call", "call_id": "c2", "name": "look", "input": "ABC"},
                {
                    "type": "custom_tool_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "Up."}],
                },
                {"role": "developer", "content": "Late."},
            ],
            '{"call":"c1","function":"quote","input":"{}"}\n{"call":"c1","output":"112.5"}\n'
            '{"call":"c2","function":"look","input":"ABC"}\n{"call":"c2","output":"Up."}\n'
            '{"role":"developer","content":"Late."}',
        ),
    ],
)
async def test_the_model_reads_the_whole_input(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, given: Any, text: str
) -> None:
    fake_sidecar.hermes.answers = [SURE]
    response = await asking.post("/v1/decisions", json=body(given=given))
    assert response.status_code == 200
    assert user_turn(fake_sidecar).startswith(f"Input:\n{text}\n\nQuestion: It is long.\n")


async def test_the_first_system_messages_are_the_system_turn(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [SURE]
    given = [
        {"role": "developer", "content": "Be strict."},
        {"role": "system", "content": [{"type": "input_text", "text": "Be short."}]},
        {"role": "user", "content": "Long ABC."},
    ]
    await asking.post("/v1/decisions", json=body(given=given))
    assert first_chat(fake_sidecar)[0] == {
        "role": "system",
        "content": "Be strict.\n\nBe short.",
    }
    assert user_turn(fake_sidecar).startswith("Input:\nLong ABC.\n\n")


async def test_instructions_may_have_several_parts(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [SURE]
    parts = [{"type": "input_text", "text": "Fits:"}, {"type": "input_json", "data": {"a": 1}}]
    await asking.post("/v1/decisions", json=body({"type": "predicate", "instructions": parts}))
    assert 'Question: Fits:\n{"a":1}\n' in user_turn(fake_sidecar)


async def test_what_changes_no_answer_is_ignored(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [SURE]
    part = {
        "type": "input_text",
        "text": "Long ABC.",
        "prompt_cache_breakpoint": {"mode": "explicit"},
    }
    sent = body(
        given=[{"role": "user", "content": [part]}],
        prompt_cache_key="desk",
        prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        safety_identifier="u-1",
    )
    assert (await asking.post("/v1/decisions", json=sent)).status_code == 200


# Errors

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"model": "hermes", "input": "x"}, "questions"),
        (body() | {"questions": []}, "questions"),
        (body(*[PREDICATE] * (MAX_QUESTIONS + 1)), "questions"),
        (body(model="a" * 129), "model"),
        (body(given=[]), "input"),
        (body(given=7), "input"),
        (body(given=[{"role": "user"}]), "input[0]"),
        (body(given=[{"role": "tool", "content": "x"}]), "input[0].role"),
        (body(given=[{"role": "user", "content": [IMAGE]}]), "input[0].content[0]"),
        (body(given=[{"role": "user", "content": [{"type": "input_file"}]}]), None),
        (body(given=[{"role": "user", "content": [{"type": "input_json"}]}]), None),
        (body(given=[{"type": "function_call_output", "call_id": "c", "output": "x"}]), "input"),
        (body(PREDICATE | {"type": "essay"}), "questions[0].type"),
        (body(PREDICATE | {"instructions": [IMAGE]}), "questions[0].instructions[0]"),
        (body(PREDICATE | {"choices": CHOICE["choices"]}), "questions[0]"),
        (body({"type": "choice", "instructions": "x"}), "questions[0]"),
        (body(CHOICE | {"choices": [{"value": "a"}]}), "questions[0].choices"),
        (body(CHOICE | {"choices": [{"value": "a"}] * 2}), "questions[0].choices"),
        (body(CHOICE | {"choices": [{"value": f"{n}"} for n in range(256)]}), None),
        (body(CHOICE | {"choices": [{"value": 1}, {"value": 2}]}), None),
        (body(SCORE | {"levels": [{"label": "a"}]}), "questions[0].levels"),
        (body(SCORE | {"levels": [{"label": f"{n}"} for n in range(11)]}), None),
        (body(SCORE | {"levels": [{"label": ""}, {"label": "b"}]}), None),
        (body(PREDICATE | {"instructions": "a\0b"}), None),
        (body(given="x" * 40_000), "input"),
        (body(PREDICATE | {"instructions": "x" * 40_000}), "questions"),
        (body(*[PREDICATE | {"instructions": "x" * 1000}] * 40), "questions"),
    ],
)
async def test_bad_input_is_400_and_names_the_field(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, sent: dict[str, Any], param: str | None
) -> None:
    response = await asking.post("/v1/decisions", json=sent)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param, error
    assert fake_sidecar.hermes.calls == []


async def test_the_largest_question_is_answered(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [ChoiceScores({f"{n}": 1 / 255 for n in range(1, 256)})]
    choice = CHOICE | {"choices": [{"value": f"{n}"} for n in range(255)]}
    response = await asking.post("/v1/decisions", json=body(choice))
    (answer,) = response.json()["answers"]
    assert (answer["choice"], len(answer["probabilities"])) == ("0", 255)
    assert answer["confidence"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("error", "status", "param", "retry_after"),
    [
        (QueueFull("The hermes queue is full.", retry_after=7), 429, None, "7"),
        (DeadlineExceeded("Too late.", retry_after=5), 504, None, "5"),
        (InvalidRequest("it takes 9000 tokens", field="prompt"), 400, "input", None),
    ],
)
async def test_an_error_of_the_model_has_its_status(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    error: Exception,
    status: int,
    param: str | None,
    retry_after: str | None,
) -> None:
    fake_sidecar.hermes.answers = [error]
    response = await asking.post("/v1/decisions", json=body())
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert response.headers.get("Retry-After") == retry_after


async def test_an_unknown_model_is_404(asking: httpx.AsyncClient) -> None:
    response = await asking.post("/v1/decisions", json=body() | {"model": "gpt-6-luna"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"

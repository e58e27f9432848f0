"""Free-text chat with Hermes."""

from __future__ import annotations

import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import QueueFull
from llm_sidecar.models.base import Delta, GenerationRequest
from llm_sidecar.services.chat import Chat
from tests.unit.fakes import FakeSidecar, PausedModel, text_of
from tests.unit.services.samples import CRITIQUE, fake_sidecar


@pytest.mark.parametrize("temperature", [None, 0.0, 0.6])
async def test_a_free_question_is_neither_stored_nor_published(temperature: float | None) -> None:
    made = fake_sidecar(models={"hermes_temperature": temperature})
    deadline = Deadline.after(60.0)
    assert await text_of(made.sidecar.chat.answer("What now?", 12, deadline)) == CRITIQUE
    messages = hermes_plugin.chat_messages("What now?")
    (call,) = made.hermes.calls
    assert call.request == GenerationRequest(messages, 12, None, temperature, None)
    # At the deadline, the text so far is better than none.
    assert (call.deadline, call.allow_partial) == (deadline, True)
    assert made.happened.log == []


async def test_its_chat_begins_with_the_system_message_of_the_model() -> None:
    made = fake_sidecar()
    prompts = hermes_plugin.PROMPTS.model_copy(update={"system": "Answer in one word."})
    chat = Chat(made.hermes, None, prompts)
    await text_of(chat.answer("What now?", 12, Deadline.after(60.0)))
    (call,) = made.hermes.calls
    messages = hermes_plugin.chat_messages("What now?", "Answer in one word.")
    assert call.request == GenerationRequest(messages, 12, temperature=None)


async def test_its_answer_streams_and_closing_it_stops_hermes() -> None:
    hermes = PausedModel("Sell", ".")
    answering = FakeSidecar(hermes=hermes).sidecar.chat.answer(
        "What now?", 12, Deadline.after(60.0)
    )
    assert await anext(answering) == Delta("Sell", "paused/fake")
    await answering.aclose()
    assert hermes.closed == 1


async def test_an_error_of_the_model_reaches_the_caller() -> None:
    made = fake_sidecar()
    made.hermes.answers = [QueueFull("full", retry_after=3)]
    with pytest.raises(QueueFull, match="full"):
        await text_of(made.sidecar.chat.answer("What now?", 12, Deadline.after(60.0)))

"""How chats are rendered with different templates, and which templates are refused."""

from __future__ import annotations

import pytest

from llm_sidecar.engines import Message
from llm_sidecar.engines.chat_layout import ChatLayout
from llm_sidecar.engines.chat_template import ChatTemplate
from llm_sidecar.errors import ModelUnavailable

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
HEADER = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT: list[Message] = [
    {"role": "system", "content": "Judge."},
    {"role": "user", "content": "Long ABC."},
]
STARTED: Message = {"role": "assistant", "content": "Score:"}
NO_SYSTEM = "the chat template has no system role: the system text begins the first user turn"
THOUGHT = "the chat template begins a thought: it is closed before the answer"
NO_HEADER = "the chat template does not begin the assistant's turn: its header is added"


def layout(source: str) -> ChatLayout:
    return ChatLayout(ChatTemplate(source, {}))


def test_a_template_with_everything_is_left_as_it_is() -> None:
    found = layout(TURNS + HEADER)
    assert (found.notes, found.gap, found.header) == ((), "", "</user><assistant>")
    assert found.render(CHAT) == "<system>Judge.</system><user>Long ABC.</user><assistant>"


@pytest.mark.parametrize(
    "before",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}",
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
        # Only without examples.
        "{% if messages[0].role == 'system' and messages | length < 3 %}"
        "{% set messages = messages[1:] %}{% endif %}",
    ],
    ids=["refused", "left out", "left out sometimes"],
)
def test_without_a_system_role_the_text_begins_the_first_user_turn(before: str) -> None:
    found = layout(before + TURNS + HEADER)
    assert found.notes == (NO_SYSTEM,)
    assert found.render(CHAT) == "<user>Judge.\n\nLong ABC.</user><assistant>"
    assert found.render(CHAT[1:]) == "<user>Long ABC.</user><assistant>"
    answered = [*CHAT, {"role": "assistant", "content": "No."}, CHAT[1]]
    assert found.render(answered) == (
        "<user>Judge.\n\nLong ABC.</user><assistant>No.</assistant>"
        "<user>Long ABC.</user><assistant>"
    )


def test_a_missing_header_is_added_as_the_template_writes_it_before_an_answer() -> None:
    found = layout(TURNS)
    assert (found.notes, found.header) == ((NO_HEADER,), "</user><assistant>")
    assert found.render(CHAT[1:]) == "<user>Long ABC.</user><assistant>"


def test_white_space_before_an_answer_is_no_header() -> None:
    found = layout(TURNS.replace(">{{ m.content", "> {{ m.content") + HEADER)
    assert (found.notes, found.gap) == ((), " ")
    assert found.render(CHAT[1:]) == "<user> Long ABC.</user><assistant>"
    # It stands before an answer that the chat starts.
    assert found.render([CHAT[1], STARTED]) == "<user> Long ABC.</user><assistant> Score:"


@pytest.mark.parametrize("source", [TURNS + HEADER, TURNS])
def test_an_answer_that_the_chat_starts_stays_open(source: str) -> None:
    found = layout(source)
    assert found.render([*CHAT, STARTED]) == (
        "<system>Judge.</system><user>Long ABC.</user><assistant>Score:"
    )
    assert (
        found.answer_start([*CHAT, STARTED]),
        found.answer_start(CHAT),
        found.answer_start([]),
    ) == ("Score:", "", "")


@pytest.mark.parametrize(
    ("opening", "closing"), [("<think>\n", "\n</think>\n\n"), ("[THINK]", "\n[/THINK]\n\n")]
)
def test_a_thought_is_closed_before_the_answer(opening: str, closing: str) -> None:
    source = TURNS + HEADER.replace("<assistant>", f"<assistant>{opening}")
    found = layout(source)
    assert found.notes == (THOUGHT,)
    assert found.render(CHAT[1:]) == f"<user>Long ABC.</user><assistant>{opening}{closing}"


def test_a_thought_is_closed_as_the_template_itself_closes_it() -> None:
    turns = TURNS.replace(
        ">{{ m.content", ">{{ '<think></think>\n' if m.role == 'assistant' }}{{ m.content"
    )
    found = layout(turns + HEADER.replace("<assistant>", "<assistant><think>"))
    assert found.notes == (THOUGHT,)
    assert found.render(CHAT[1:]) == "<user>Long ABC.</user><assistant><think></think>\n"


@pytest.mark.parametrize("variable", ["enable_thinking", "thinking"])
def test_thoughts_are_switched_off_if_the_template_can(variable: str) -> None:
    thought = "{% if " + variable + " %}<think>{% else %}<think></think>{% endif %}"
    found = layout(TURNS + HEADER.replace("<assistant>", f"<assistant>{thought}"))
    assert found.notes == ()
    assert found.render(CHAT[1:]) == "<user>Long ABC.</user><assistant><think></think>"


def test_a_message_that_begins_a_thought_closes_nothing() -> None:
    found = layout(TURNS + HEADER)
    chat = [{"role": "user", "content": "<think>"}]
    assert found.render(chat) == "<user><think></user><assistant>"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('no') }}", "refuses a chat with the roles user"),
        (
            "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + TURNS,
            "refuses a chat with the roles user, assistant",
        ),
        ("<user>{{ messages[-1].content }}</user>", "leaves out the text of the assistant"),
        (TURNS.replace("{{ m.content }}", ""), "leaves out the system text"),
        (
            TURNS.replace("{{ m", "{{ '' if m.role == 'user' else m"),
            "leaves out the text of the user",
        ),
        (
            "{% for m in messages if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}"
            "{% endfor %}<assistant>",
            "leaves out the text of the assistant",
        ),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "does not mark where the user's text ends",
        ),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", r"cannot be compiled \(RecursionError\)"),
        ("{% break %}", r"cannot be compiled \(SyntaxError\)"),
    ],
)
def test_a_template_that_cannot_be_served_is_refused_with_the_reason(
    source: str, problem: str
) -> None:
    with pytest.raises(ModelUnavailable, match=f"the model's chat template {problem}") as caught:
        layout(source)
    assert caught.value.detail.endswith("in the model's folder")

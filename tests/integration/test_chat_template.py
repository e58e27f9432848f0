"""Chat templates: the text that transformers renders, and clear errors where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llm_sidecar.engines.chat_template import ChatTemplate, read_special_tokens, read_template
from llm_sidecar.errors import ModelUnavailable

CHAT = [
    {"role": "system", "content": "You review trades."},
    {"role": "user", "content": " <b>Long ABC</b> & 'X' \u4fa1 \n"},
    {"role": "assistant", "content": '{"ticker":"ABC"}'},
    {"role": "user", "content": "And now?"},
]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "plain": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "whitespace is trimmed around blocks": """
    {% for m in messages %}
        {%- if m['role'] == 'user' %}
[INST] {{ m['content'] | trim }} [/INST]
        {% else %}
{{ m['content'] }}{{ eos_token }}
        {% endif %}
    {% endfor %}
""",
    "special tokens, slices and namespaces": "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ (ns.system ~ '\n' if loop.first and ns.system) ~ m.content }}{% endfor %}{{ pad_token }}",
    "the end of a dialogue": "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
    "JSON": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}"
    "{{ {'b': 'ä', 'a': 1} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}"
    "{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation blocks": "{% for m in messages %}{% set x = 'outside' %}{% generation %}"
    "{% set x = 'inside' %}{{ m.content }}{{ loop.index }}{% endgeneration %}{{ x }}{% endfor %}",
    "the date": "{{ strftime_now('%Y %B') }}{{ strftime_now(format='%Y') }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['a'], 3) }}{{ namespace(self=4).self }}",
    "no tools and no documents": "{{ tools is none }}{{ documents is none }}{{ unknown }}",
    "macros": "{% macro turn(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_the_text_is_that_of_transformers(source: str, header: bool) -> None:
    (expected,), _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=header, **SPECIAL_TOKENS
    )
    assert ChatTemplate(source, SPECIAL_TOKENS).render(CHAT, header) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate: ' + messages[1].content) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(_a=1) }}",
        "{% set n = namespace() %}{% set n._a = 1 %}",
        "{{ range(1000000) | length }}",
        "{{ messages[1].content + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_named_and_the_chat_is_not_quoted(source: str) -> None:
    with pytest.raises(ModelUnavailable, match="roles system, user, assistant") as caught:
        ChatTemplate(source, {}).render(CHAT)
    assert "ABC" not in caught.value.detail
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_template_that_is_not_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ModelUnavailable, match="not valid Jinja: line 2: "):
        ChatTemplate("{{ 1 }}\n{% for %}", {})


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.json", {"chat_template": "third"})
    assert read_template(tmp_path) == "third"
    write(tmp_path, "tokenizer_config.json", {"chat_template": "second"})
    assert read_template(tmp_path) == "second"
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert read_template(tmp_path) == "é"


@pytest.mark.parametrize(
    "named",
    [
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}],
        {"default": "plain", "rag": "documents"},
    ],
)
def test_of_several_templates_the_default_is_taken(tmp_path: Path, named: Any) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert read_template(tmp_path) == "plain"


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"chat_template": [{"name": "tool_use", "template": "tools"}]},
        {"chat_template": [{"name": ["default"], "template": "tools"}, None, 5]},
    ],
)
def test_a_folder_without_a_template_says_what_to_add(tmp_path: Path, config: Any) -> None:
    if config is not None:
        write(tmp_path, "tokenizer_config.json", config)
    with pytest.raises(ModelUnavailable, match=r"has no chat template: add a chat_template\.jinja"):
        read_template(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000])
def test_a_broken_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelUnavailable, match=r"tokenizer_config\.json is not a JSON object"):
        read_template(tmp_path)


def test_a_template_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ModelUnavailable, match=r"chat_template\.jinja is not UTF-8"):
        read_template(tmp_path)


def test_special_tokens_are_read_as_text_or_with_their_properties(tmp_path: Path) -> None:
    assert read_special_tokens(tmp_path) == {}
    legacy = {"bos_token": "<old>", "unk_token": {"content": "<unk>"}, "eos_token": "<old>"}
    write(tmp_path, "special_tokens_map.json", legacy)
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    write(tmp_path, "tokenizer_config.json", {**config, "pad_token": None, "model_max_length": 1})
    found = read_special_tokens(tmp_path)
    assert found == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

"""A model's chat template, rendered as transformers renders it, without importing transformers.

    template = ChatTemplate(read_template(folder), read_special_tokens(folder))
    text = template.render([{"role": "user", "content": "Hi."}])

The environment is that of transformers 5.23 (`utils/chat_template_utils.py`): its options,
extensions, globals and `tojson` filter.

A template is a program that comes with a model. The sandbox isolates it from the rest of the
process and limits `range`, but cannot limit its time. So `ChatTokenizer` tries the template on
loading, and a worker ends itself if a later rendering takes too long.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llm_sidecar.engines.base import Message
from llm_sidecar.errors import ModelUnavailable

_TEMPLATE_FILE: Final = "chat_template.jinja"
_CONFIG_FILE: Final = "tokenizer_config.json"
_LEGACY_TOKENS_FILE: Final = "special_tokens_map.json"
_SPECIAL_TOKENS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_WITHOUT_THOUGHTS: Final = {"enable_thinking": False, "thinking": False}
"""Switches off thoughts in the templates that can: `enable_thinking` in those of Qwen 3, GLM and
SmolLM 3, `thinking` in those of Granite, DeepSeek and Hermes 4."""


class ChatTemplate:
    """Renders a chat as the model's prompt text.

    Attributes:
        literals: all literal texts in the template, joined by NUL.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compiles a template.

        Args:
            source: in Jinja.
            special_tokens: `bos_token` and others, which it may use.

        Raises:
            ModelUnavailable: it is not a valid Jinja template.
        """
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.literals = _literals(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelUnavailable(
                f"the model's chat template is not valid Jinja: line {error.lineno}: "
                f"{error.message}; correct the template in the model's folder"
            ) from None
        except Exception as error:  # noqa: BLE001 - Python cannot compile what Jinja has made of it
            raise ModelUnavailable(
                f"the model's chat template cannot be compiled ({type(error).__name__}); simplify "
                "the template in the model's folder"
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], header: bool = True) -> str:
        """The chat as text, with the header of the assistant's turn or without; thoughts are
        switched off if the template can do that.

        Raises:
            ModelUnavailable: the template refuses the chat, or fails on it.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=header,
                **_WITHOUT_THOUGHTS,
                **self._special_tokens,
            )
        except Exception as error:  # noqa: BLE001 - a template can raise anything
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            # The error's message may quote the chat.
            raise ModelUnavailable(
                f"the model's chat template refuses a chat with the roles {roles} "
                f"({type(error).__name__}); set a template that takes them in the model's folder"
            ) from None


def read_template(folder: Path) -> str:
    """The source of the chat template in a model's folder.

    It is in chat_template.jinja, in tokenizer_config.json or in chat_template.json, which
    onnxruntime-genai reads too. Of several templates it is the one named `default`.

    Raises:
        ModelUnavailable: there is none.
    """
    file = folder / _TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelUnavailable(
                f"{file} is not UTF-8; copy it again from the original model"
            ) from None
    for name in (_CONFIG_FILE, "chat_template.json"):
        found = _read_object(folder / name).get("chat_template")
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict)]
            found = {f"{entry.get('name')}": entry.get("template") for entry in named}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    raise ModelUnavailable(
        f"{folder} has no chat template: add a {_TEMPLATE_FILE}, or a chat_template to its "
        f"{_CONFIG_FILE} (of several, one named default)"
    )


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a template may use: `bos_token`, `eos_token` and others."""
    written = {
        **_read_object(folder / _LEGACY_TOKENS_FILE),
        **_read_object(folder / _CONFIG_FILE),
    }
    found = {}
    for name in (f"{token}_token" for token in _SPECIAL_TOKENS):
        token = written.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        written = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        written = None
    if not isinstance(written, dict):
        raise ModelUnavailable(f"{file} is not a JSON object; copy it from the original model")
    return written


def _literals(template: nodes.Template) -> str:
    texts = [data.data for data in template.find_all(nodes.TemplateData)]
    texts += [const.value for const in template.find_all(nodes.Const) if type(const.value) is str]
    return "\0".join(texts)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training and writes its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, which refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` may be one of the names.
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a name in a namespace must not begin with _")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter writes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - as transformers calls it
    return datetime.datetime.now().strftime(format)  # noqa: DTZ005 - local time, as transformers has it

"""The HTML page of a profile: pyinstrument's page below a table of the model calls."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Final

from pyinstrument.renderers import HTMLRenderer
from pyinstrument.session import Session

from llm_sidecar.telemetry.calls import ModelCall

_OUTSIDE: Final = re.compile(r"https://fonts\.googleapis\.com/[^\"'`\s<>\\]*")
"""Fonts that pyinstrument's page loads; it works without them."""
_OWN: Final = re.compile("<(script|style)>")
_COLUMNS: Final = ("model", "operation", "queue", "prefill", "decode", "total", "tokens", "outcome")
_STYLE: Final = """<style>
body { display: flex; flex-direction: column; height: 100vh }
#model-calls { font: 14px sans-serif; padding: 8px 16px }
#model-calls td, #model-calls th { padding-right: 24px; text-align: left }
#app { flex: 1; position: relative; transform: translate(0) }
</style>"""
"""The transform makes elements that pyinstrument fixes to the window fixed to `#app` instead."""


def render(heading: str, calls: Sequence[ModelCall], session: Session, nonce: str = "") -> str:
    """The page.

    Args:
        heading: one line about the request.
        calls: the request's model calls.
        session: the samples.
        nonce: of the content security policy, for the page's scripts and style sheets.
    """
    session.target_description = heading
    page = _OUTSIDE.sub("", HTMLRenderer().render(session))
    above = f'{_STYLE}<div id="model-calls"><p>{html.escape(heading)}</p>{_table(calls)}</div>'
    page = page.replace("<body>", f"<body>{above}", 1)
    return _OWN.sub(rf'<\1 nonce="{nonce}">', page)


def _table(calls: Sequence[ModelCall]) -> str:
    if not calls:
        return "<p>No model was called.</p>"
    rows = "".join(_row("td", _cells(call)) for call in calls)
    return f"<table>{_row('th', _COLUMNS)}{rows}</table>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cells(call: ModelCall) -> list[str]:
    spans = {name: f"{ended - began:.3f} s" for name, began, ended in call.phases()}
    tokens = f"{call.prompt_tokens} + {call.completion_tokens}" if call.first_token else ""
    return [
        call.served_by or call.model,
        call.operation,
        *(spans.get(phase, "") for phase in ("queue", "prefill", "decode")),
        "" if call.finished is None else f"{call.finished - call.queued:.3f} s",
        tokens,
        call.error or call.finish_reason or "answered",
    ]

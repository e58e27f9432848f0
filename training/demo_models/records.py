"""The first writer's machine-made layouts: key-value pairs in many notations, logs, tables."""

from __future__ import annotations

import json
from typing import Final

from training.demo_models import lexicon
from training.demo_models.positions import FIELD_KEYS, FIELD_VALUES, SENTENCES, SIGNED_KEYS, TAGS
from training.demo_models.scene import Scene
from training.demo_models.situations import Side

_TICK: Final = chr(0xE000)
_TICKER_KEYS: Final = (
    "{ticker|symbol|sym|Ticker|Symbol|SYMBOL|TICKER|SYM|instrument|inst|asset|security|sec|stock|tkr|"
    "tick|underlying|ul|code|ric|product|contract|pair|market|mkt|tk|equity|issue|instr|bbg|secid|"
    "epic|paper|name|focus|subject|holding_in|Instrument|stk|und|coin|fx|issuer_code}"
)
_NOISE_FIELDS: Final = (
    ("{price|px|last|mark|mid|last_px|close|Last|PX}", "<price>"),
    ("{entry|avg|avg_px|cost|open|fill|avg_cost|basis|in_at|entry_price}", "<entry>"),
    ("{time|ts|asof|timestamp|t0|when|as_of}", "<time>"),
    ("{acct|account|book|portfolio|strategy|desk|owner|client}", "{<acc>|<acronym>|<name>}"),
    ("{trader|pm|user|by|analyst}", "{<name>|<acronym>}"),
    ("{rsi|RSI}", "<neutral_rsi>"),
    ("{beta|corr|delta}", "0.<d><d>"),
    ("{ccy|currency}", "{USD|EUR}"),
    ("{venue|exch|exchange|mic}", "{NYSE|NASDAQ|XNAS|LSE|CME|<acronym>}"),
    ("{benchmark|bench|index|hedge|vs}", "<index>"),
    ("{peer|comp|related|pair_leg}", "<peer>"),
    ("{conviction|weight|prio|risk}", "{low|medium|high|<d>|0.<d>}"),
    ("{vwap|ema|sma50}", "<price>"),
    (
        "{ask|request|question|task|todo}",
        "{review|adjust?|levels?|stop and target|what now|advise}",
    ),
    ("{tf|horizon|style|timeframe}", "{swing|intraday|1d|4h|long-term|short-term|position|weekly}"),
    ("{type|ordtype|tif|order_type}", "{LMT|MKT|GTC|DAY|limit|market}"),
    ("{sector|theme}", "<acronym>"),
    ("{status|state}", "{open|OPEN|live|active|filled}"),
    ("{rating|consensus}", "{buy|sell|hold}"),
    ("{short_interest|si|days_to_cover}", "<small>"),
    ("{id|ref|order_id|ticket}", "<acc>"),
)


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    """The scene as keys and values; in half of the cases the instrument comes first."""
    rng = scene.rng
    head = [(scene.say(_TICKER_KEYS), _TICK)]
    if scene.side is not None:
        if rng.random() < 0.13:
            sign = "-" if scene.side == "SHORT" else "+"
            head.append((scene.say(SIGNED_KEYS), scene.position((f"{sign}<qty>",))))
        else:
            key = lexicon.nonce(rng) if rng.random() < 0.04 else scene.say(FIELD_KEYS)
            head.append((key, scene.position((FIELD_VALUES[scene.side],))))
            if rng.random() < 0.35:
                head.append((scene.say("{qty|size|shares|units|lots}"), scene.say("<qty>")))
    else:
        head += [(scene.say("{qty|size}"), scene.say("<qty>"))] * (rng.random() < 0.2)
    rest = [scene.situation_field()]
    if rng.random() < 0.4:
        rest.append(
            (scene.say("{atr|ATR|atr_pct|ATR%|atr14_pct}"), scene.say("{<atr>%|<atr>|<atr>pct}"))
        )
    for key, value in rng.sample(_NOISE_FIELDS, rng.randrange(6)):
        rest.append((scene.say(key), scene.say(value)))
    rng.shuffle(rest)
    if rng.random() < 0.5:
        return head + rest
    both = head + rest
    rng.shuffle(both)
    return both


def fields(scene: Scene) -> str:
    """Keys and values in one of a dozen notations."""
    rng = scene.rng
    if rng.random() < 0.08:
        return _fix(scene)
    pairs = _pairs(scene)
    kind = rng.random()
    if kind < 0.12:
        return _json(scene, pairs)
    if kind < 0.17:
        return "".join(f"<{k}>{v}</{k}>" for k, v in pairs)
    head = scene.say(
        "{||||[position]\n|[<acronym>]\n|position:\n|INFO |<time> INFO risk - |POS |trade{:|} |#<acc>\n|"
        "<time> |[<time>] <acronym> |ALERT |row: |UPDATE |---\n|? |{Position|Trade|Alert} {update|report}"
        "{:|} \n}"
    )
    equals = rng.choice(
        ("=", "=", "=", ":", ": ", ": ", " = ", " ", " - ", "->", ":=", "\t", " : ")
    )
    joiner = rng.choice((" ", " ", ", ", "; ", "\n", "\n", "\n", "|", " | ", ";", "&", ",", " / "))
    if equals == " " and joiner == " ":
        joiner = ", "
    quote = rng.choice(("", "", "", "", '"', "'"))
    keys = rng.choice((str, str, str.upper, str.lower, str.title))
    lead = "- " if joiner == "\n" and rng.random() < 0.2 else ""
    return head + joiner.join(f"{lead}{keys(k)}{equals}{quote}{v}{quote}" for k, v in pairs)


def _json(scene: Scene, pairs: list[tuple[str, str]]) -> str:
    rng = scene.rng
    record: dict[str, object] = {}
    for key, value in pairs:
        number = value.replace(".", "", 1).isdigit() and not value.startswith("0")
        record[key] = json.loads(value) if number and value[-1] != "." else value
    if rng.random() < 0.2:
        record = {rng.choice(("position", "trade", "data", "pos")): record}
    return json.dumps(
        record,
        indent=rng.choice((None, None, 2)),
        separators=rng.choice(((",", ":"), (", ", ": "))),
        ensure_ascii=False,
    )


def _fix(scene: Scene) -> str:
    """The tag=value notation of the FIX protocol: 55 symbol, 54 side (1 buy, 2 sell), 58 text."""
    rng = scene.rng
    tags = ["35=" + rng.choice("D8AE"), f"55={_TICK}"]
    if scene.side is not None:
        tags.append(scene.position((f"54={1 if scene.side == 'LONG' else 2}",)))
    tags += [
        scene.say(t) for t in rng.sample(("38=<qty>", "44=<price>", "1=<acc>", "49=<acronym>"), 2)
    ]
    tags.append("58=" + scene.situation_shorthand())
    if rng.random() < 0.4:
        rng.shuffle(tags)
    return rng.choice(("|", "|", " ", "^", "; ", "\x01")).join(tags)


def table(scene: Scene) -> str:
    """A table of ticks or positions, and around it the facts that the table does not hold."""
    rng = scene.rng
    return _positions(scene) if rng.random() < 0.45 else _ticks(scene)


def _rows(scene: Scene, header: list[str], rows: list[list[str]]) -> str:
    """Rows as CSV, markdown, aligned or tab-separated text."""
    rng = scene.rng
    lines = ([header] if rng.random() < 0.85 else []) + rows
    kind = rng.random()
    if kind < 0.45:
        joiner = rng.choice((",", ",", ", ", ";", "\t", " ", "|", " | "))
        return "\n".join(joiner.join(line) for line in lines)
    if kind < 0.7:
        marked = ["| " + " | ".join(line) + " |" for line in lines]
        marked.insert(1, "|" + rng.choice(("---", "-", ":--")).join("|" * len(header)) + "---|")
        return "\n".join(marked)
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(header))]
    left = rng.random() < 0.5
    return "\n".join(
        "".join(
            cell.ljust(w) if left else cell.rjust(w) for cell, w in zip(line, widths, strict=True)
        )
        for line in lines
    )


def _ticks(scene: Scene) -> str:
    rng = scene.rng
    columns = rng.sample(
        (
            ("{last|px|price|close|Last|c}", "<price>"),
            ("{bid|Bid|b}", "<price>"),
            ("{ask|Ask|a}", "<price>"),
            ("{vol|volume|Vol|size|v}", "<qty>"),
            ("{open|o}", "<price>"),
            ("{high|h|low|l}", "<price>"),
        ),
        rng.randrange(1, 4),
    )
    inside = rng.random() < 0.5
    tape = scene.say("{time|ts|Time|t|hh:mm}"), scene.say("{sym|symbol|ticker|Sym|instr|tick}")
    header = [tape[0], *([tape[1]] if inside else []), *(scene.say(c[0]) for c in columns)]
    rows = []
    for _ in range(rng.randrange(1, 5)):
        clock = f"{rng.randrange(9, 17):02d}:{rng.randrange(60):02d}"
        rows.append([clock, *([_TICK] if inside else []), *(scene.say(c[1]) for c in columns)])
    if inside and rng.random() < 0.25:
        other = scene.say("{<index>|<index>|<peer>}")
        rows.insert(rng.randrange(len(rows)), [rows[0][0], other, *rows[0][2:]])
    around = []
    if scene.side is None:
        around.append(
            scene.say("{<t>|<t> ticks|{tape|prints|quotes|bars} {for|of|} <t>|ticker <t>}")
        )
    elif inside and rng.random() < 0.4:
        around.append(scene.position(_TABLE_SIDE[scene.side]))
    elif rng.random() < 0.5:
        around.append(scene.position(SENTENCES[scene.side]))
    else:
        tag = scene.position((TAGS[scene.side],))
        around.append(f"{_TICK} {tag}" if rng.random() < 0.5 else f"{tag} {_TICK}")
    around.append(scene.situation_sentence() if rng.random() < 0.6 else scene.situation_shorthand())
    around += [scene.atr_sentence()] * (rng.random() < 0.3) + [scene.noise()] * (rng.random() < 0.3)
    rng.shuffle(around)
    at = rng.randrange(len(around) + 1)
    joiner = rng.choice(("\n", ". ", ", ", "; "))
    parts = [joiner.join(around[:at]), _rows(scene, header, rows), joiner.join(around[at:])]
    return rng.choice(("\n", "\n", "\n\n")).join(part for part in parts if part)


_TABLE_SIDE: Final[dict[Side, tuple[str, ...]]] = {
    "LONG": (
        "{we are|position|pos|side|i am|book|book is|desk|desk is|direction} {long|LONG|long <qty>|net "
        "long|+<qty>}{| from <entry>}",
        "{bought|long|own} <qty>{| at <entry>}",
    ),
    "SHORT": (
        "{we are|position|pos|side|i am|book|book is|desk|desk is|direction} {short|SHORT|short <qty>|"
        "net short|-<qty>}{| from <entry>}",
        "{sold short|short|shorted} <qty>{| at <entry>}",
    ),
}


def _positions(scene: Scene) -> str:
    """A table with one position, or with several and a line that names the one in question."""
    rng = scene.rng
    value_of = {"LONG": scene.say(FIELD_VALUES["LONG"]), "SHORT": scene.say(FIELD_VALUES["SHORT"])}
    columns: list[tuple[str, str]] = rng.sample(
        (
            ("{qty|size|Qty|shares}", "<qty>"),
            ("{avg|entry|cost|Entry}", "<entry>"),
            ("{last|px|mark|Last}", "<price>"),
            ("{time|opened}", "<time>"),
            ("{acct|book}", "<acc>"),
        ),
        rng.randrange(1, 4),
    )
    key, note = scene.situation_field()
    has_note = rng.random() < 0.7
    header = [scene.say(_TICKER_KEYS), scene.say(FIELD_KEYS), *(scene.say(c[0]) for c in columns)]
    order = list(range(len(header) + has_note))
    if rng.random() < 0.4:
        rng.shuffle(order)
    many = rng.random() < 0.2 and scene.side is not None

    def row(ticker: str, side: str, remark: str) -> list[str]:
        cells = [ticker, side, *(scene.say(c[1]) for c in columns), *([remark] if has_note else [])]
        return [cells[i] for i in order]

    names = [*header, *([key] if has_note else [])]
    if scene.side:
        scene.positions.append(value_of[scene.side])
    rows = [row(_TICK, value_of[scene.side] if scene.side else "-", note)]
    if many:
        for _ in range(rng.randrange(1, 3)):
            side = rng.choice(("LONG", "SHORT"))
            rows.append(row(scene.other_ticker(), value_of[side], "-"))
        rng.shuffle(rows)
    text = _rows(scene, [names[i] for i in order], rows)
    after = [] if has_note else [scene.situation_sentence()]
    if many:
        after.append(
            scene.say("{review|only|this is about|look at|question on|adjust|focus on} <t>")
        )
    after += [scene.atr_sentence()] * (rng.random() < 0.3) + [scene.noise()] * (rng.random() < 0.2)
    rng.shuffle(after)
    return "\n".join([text, *after] if rng.random() < 0.8 else [*after, text])

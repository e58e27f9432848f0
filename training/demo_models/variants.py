"""The second writer of prompts: shorthand, fields, prose, news and tables about one scene."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from training.demo_models import lexicon, tickers
from training.demo_models.phrases import PHRASES
from training.demo_models.situations import Side
from training.demo_models.templates import expand


@dataclass(frozen=True, slots=True)
class Scene:
    """The facts that a prompt states.

    Attributes:
        ticker: the instrument.
        side: of the open position; None if the prompt states none.
        situation: key of `PHRASES`.
        number: the situation's number as written.
        atr: average true range in percent as written, or None.
        price: the last price.
        split: split of all other tickers.
    """

    ticker: str
    side: Side | None
    situation: str
    number: str
    atr: str | None
    price: float
    split: tickers.Split


@dataclass(slots=True)
class Draft:
    """A prompt while it is written.

    Attributes:
        number_stated: whether the situation's number was written.
        phrases: written phrases about the situation.
        positions: written phrases that state the side.
    """

    rng: Random
    scene: Scene
    number_stated: bool = False
    phrases: list[str] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)

    def expand_phrase(self, template: str) -> str:
        """Expands a template about the situation."""
        self.phrases.append(" ".join(self.expand(template).split()))
        return self.phrases[-1]

    def note_position(self, position: str) -> str:
        """Records and returns a phrase that states the side, if the scene has one."""
        if self.scene.side is not None:
            self.positions.append(position)
        return position

    def expand(self, template: str) -> str:
        return expand(template, self.rng, self._slot)

    def _slot(self, name: str) -> str:
        rng, scene = self.rng, self.scene
        if name == "n":
            self.number_stated = True
            return scene.number
        slots: dict[str, Callable[[], str]] = {
            "t": lambda: scene.ticker,
            "q": lambda: quantity(rng),
            "p": lambda: price(rng, scene.price),
            "e": lambda: price(rng, scene.price * rng.uniform(0.8, 1.2)),
            "a": lambda: scene.atr or "",
            "co": lambda: lexicon.company(rng),
            "x": lambda: rng.choice(lexicon.EXCHANGES),
            "who": lambda: lexicon.name(rng),
            "o": lambda: tickers.random_ticker(rng, scene.split),
            "i": lambda: rng.choice(tickers.INDEXES),
            "ac": lambda: rng.choice(tickers.ACRONYMS),
            "pc": lambda: percent(rng),
            "w": lambda: lexicon.nonce(rng),
            "hm": lambda: f"{rng.randrange(0, 24):02d}:{rng.randrange(60):02d}",
            "d": lambda: str(rng.randrange(2, 99)),
            "day": lambda: rng.choice(
                ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "today", "yesterday"]
            ),
        }
        return slots[name]()


def quantity(rng: Random) -> str:
    base = rng.choice(
        (rng.randrange(1, 100), rng.randrange(1, 50) * 100, rng.randrange(1, 20) * 1000)
    )
    return rng.choice((str(base), str(base), f"{base:,}", f"{max(1, base // 1000)}k"))


def price(rng: Random, value: float) -> str:
    digits = 4 if value < 3 else rng.choice((0, 1, 2, 2, 2))
    return f"{value:,.{digits}f}" if rng.random() < 0.1 else f"{value:.{digits}f}"


def percent(rng: Random) -> str:
    return f"{rng.choice('+-')}{rng.uniform(0.1, 9):.1f}%"


_LONG_PROSE: Final = (
    "{We are|We're|I am|I'm|The desk is|The fund is|The book is|Our book is|Desk|We stay|We remain|Still|Currently|Team is} "
    "{long|net long|long again|modestly long|fully long|positioned long|on the long side {of|in}} {<q> {shares|sh|lots|units|contracts} of |}<t>"
    "{ from| since| at| @|, entry} <e>",
    "{We|I|The desk|The fund|<who>} {bought|have bought|picked up|purchased|accumulated|added|loaded up on|went long|own|hold a long in|are long} "
    "{<q> {shares|lots|} {of |}|}<t>{ at <e>| last week| <day>| on the dip|}",
    "{Our|The|My|This} {long|long position|bullish position|long trade|long idea|buy|bullish trade|bull call|bullish bet} {in|on} <t> {was opened at <e>|is {live|open|on}|stands}",
    "{Long|Buy|Bought|Going long|Holding long|Open long|Existing long|Bullish on|Long position in|Long exposure to} <t>{ from <e>|, entry <e>| at <e>| @ <e>|}",
    "<t>: {we are long|long position|long|holding long|we own it|bought at <e>|bullish, we hold <q> shares long}",
    "{The position is|Position:|Side:|Direction:|Exposure is|Bias:|Trade is|It is} {a |}{long|bullish|buy}{ in <t>|}",
    "{We profit|We make money|The book gains|The desk earns} {if|when} <t> {rises|goes up|climbs|rallies}",
)
_SHORT_PROSE: Final = (
    "{We are|We're|I am|I'm|The desk is|The fund is|The book is|Our book is|Desk|We stay|We remain|Still|Currently|Team is} "
    "{short|net short|short again|modestly short|fully short|positioned short|on the short side {of|in}} {<q> {shares|sh|lots|units|contracts} of |}<t>"
    "{ from| since| at| @|, entry} <e>",
    "{We|I|The desk|The fund|<who>} {sold|have sold|sold short|shorted|have shorted|borrowed and sold|went short|hold a short in|are short|faded|bet against} "
    "{<q> {shares|lots|} {of |}|}<t>{ at <e>| last week| <day>| on the pop|}",
    "{Our|The|My|This} {short|short position|bearish position|short trade|short idea|short sale|bearish trade|bearish bet|bear call} {in|on} <t> {was opened at <e>|is {live|open|on}|stands}",
    "{Short|Sell|Sold short|Going short|Holding short|Open short|Existing short|Bearish on|Short position in|Short exposure to} <t>{ from <e>|, entry <e>| at <e>| @ <e>|}",
    "<t>: {we are short|short position|short|holding short|we shorted it|sold at <e>|bearish, we are short <q> shares}",
    "{The position is|Position:|Side:|Direction:|Exposure is|Bias:|Trade is|It is} {a |}{short|bearish|sell}{ in <t>|}",
    "{We profit|We make money|The book gains|The desk earns} {if|when} <t> {falls|goes down|drops|slides}",
)
_NO_SIDE_PROSE: Final = (
    "{Watching|Looking at|Reviewing|News on|Update on|Note on|Quick look at|Thoughts on|Watchlist:|Regarding|Re|About|FYI on} <t>",
    "{No position in|We are flat in|Flat|Nothing on in|We have no trade in|Not involved in} <t>{ yet| so far| for now|}",
    "<t> {trades|is trading|changes hands|stands|last|is quoted|prints} {at|near|around} <p>",
    "{What to do with|Any view on|Should we look at|Opinion on|Is there a trade in} <t>?",
    "<co> ({<x>|<x>}: <t>) {is in focus|reported|made headlines|was mentioned <day>|is on the screen}",
)
_NEWS_SUBJECT: Final = (
    "{Shares of |}<co> {(<x>: <t>)|(<x>:<t>)|(<t>)|(ticker <t>)|($<t>)|, ticker <t>,|[<t>]|(<t> {US|LN|GR|JP|HK})} "
    "{rose|fell|slid|gained|were little changed|closed|traded|moved|opened} {<pc>|at <p>|near <p>|} {<day>|on <day>|in early trade|after hours|}",
    "{Shares in|Stock of|The stock of} <co>, {which trades as|listed as|known to traders as|symbol} <t>, {moved <pc>|closed at <p>|stood near <p>}",
    "$<t> {moved <pc>|trades at <p>|closed at <p>|is in the news|headline <day>}",
    "<t> {moved <pc>|trades at <p>|closed at <p>|finished <day> at <p>|is at <p>}",
    "<co>'s <t> {closed at <p>|is at <p>|moved <pc>}",
)
_DISTRACT: Final = (
    "{The|} <i> {is|was|closed|trades} <pc>{ meanwhile| today|}",
    "{Peers|Rivals|Others} {such as |like |}<o> {were flat|moved <pc>|did little}",
    "{Peer|Rival|Competitor} <o> {moved <pc>|is unchanged|trades at <d>}",
    "{The|} <ac> {report|data|print|number|release} {is due <day>|came as expected|was in line|is out at <hm>}",
    "Short interest {is|stands at} <d>% of the float",
    "{Long-term|Short-term} {holders|rates|averages|outlook} {did not change|are steady|stay put}",
    "{Buyers|Sellers} {were|have been} {active|absent} {near the close|early|at the open}",
    "{The sell side|Sell-side analysts|One broker|<who>} {had no comment|kept the rating|was quoted}",
    "{Volume|Turnover|Spread} {is normal|was average|is as usual}",
    "{Stop|Stop loss} at <e>, target <e>",
    "{Last|Price|Now|Mark|Spot} {is |at |}<p>",
    "<who> {asked|called|wrote} about it {at <hm>|<day>|}",
    "<who> from <w> {said|noted|wrote} so",
)
_ATR_PROSE: Final = (
    "{ATR|The ATR|Daily ATR|Average true range|The average true range|Its daily range (ATR)} {is|at|of|stands at|runs at|:} <a>{%| percent| pct}",
)

_LONG_SHORT_HAND: Final = "{long|lng|LONG|Long|L|bot|bought|BOT|Bot|buy|BUY|+|lg|longs|long pos|we own|hold|own|B|we long|net long|BTO|bull|bullish|Lng}"
_SHORT_SHORT_HAND: Final = "{short|shrt|SHORT|Short|S|sold|sld|SOLD|Sold|sell|SELL|-|shorts|short pos|we short|net short|ss|SS|STO|bear|bearish|sht|Shrt|SLD|faded|sold short}"
_SIDE_KEYS: Final = "{side|Side|SIDE|direction|Direction|dir|DIR|position|Position|pos|POS|bias|way|bs|buy_sell|ls|pos_side|trade_side|stance|exposure|trade|type|action|order_side|book|holding|we_are|leg|view}"
_LONG_VALUES: Final = "{LONG|LONG|long|long|Long|L|BUY|buy|Buy|B|bought|BOT|bull|bullish|+<q>|long <q>|LONG <q>|<q> long|net long|1 (long)|BUY_TO_OPEN|long_only|buyer|lng}"
_SHORT_VALUES: Final = "{SHORT|SHORT|short|short|Short|S|SELL|sell|Sell|sold|SLD|bear|bearish|-<q>|short <q>|SHORT <q>|<q> short|net short|-1 (short)|SELL_SHORT|sell_short|SS|seller|shrt}"
_NO_SIDE_VALUES: Final = "{FLAT|flat|none|NONE|n/a|-|?|null|unknown|no position}"
_TICKER_KEYS: Final = "{ticker|Ticker|TICKER|symbol|Symbol|SYMBOL|sym|SYM|tkr|TKR|instrument|Instrument|INSTR|inst|ric|RIC|underlying|und|asset|name|security|sec|stock|code|product|contract|55|pair|market|instr_id|secId|bbg|equity}"
_NOISE_FIELDS: Final = (
    ("{entry|avg|avg_px|entry_price|px_in|cost|open_px|in|fill|avgPrice}", "<e>"),
    ("{last|px|price|mark|mid|spot|close|now|LastPx|quote}", "<p>"),
    ("{stop|sl|stop_loss|stp}", "<e>"),
    ("{target|tp|tgt|take_profit}", "<e>"),
    ("{qty|size|shares|quantity|lots|OrderQty}", "<q>"),
    ("{acct|account|book|desk|portfolio|pm|trader|user}", "{<w>|<who>|A<d>|<ac>}"),
    ("{time|ts|asof|t|timestamp}", "{<hm>|<hm>:00|2025-0<d>T<hm>}"),
    ("{venue|exch|exchange|mkt}", "<x>"),
    ("{ccy|currency|cur}", "{USD|EUR|GBP|JPY}"),
    ("{id|ref|ClOrdID|tid|seq}", "{<d><d>|<w>-<d>|X<d>}"),
    ("{chg|change|day|pct}", "<pc>"),
    ("{index|benchmark|hedge|beta_to}", "<i>"),
    ("{peer|vs}", "<o>"),
    ("{vwap|ema20|sma50|ma200}", "<e>"),
    ("{sector|theme|tag|strategy}", "<w>"),
    ("{<w>}", "{<w>|<d>|<e>}"),
)
_ATR_KEYS: Final = "{atr_pct|ATR%|atr%|atr|ATR|atrp|atr_14_pct}"


def _sentence(draft: Draft, template: str) -> str:
    return _finished(draft, " ".join(draft.expand(template).split()).replace(" ,", ","))


def _finished(draft: Draft, text: str) -> str:
    text = text[:1].upper() + text[1:] if draft.rng.random() < 0.9 else text
    return text if text.endswith(("?", "!")) else f"{text}."


def _situation_sentence(draft: Draft) -> str:
    return _finished(
        draft, draft.expand_phrase(draft.rng.choice(PHRASES[draft.scene.situation].sentences))
    )


def _side_prose(draft: Draft) -> str:
    choices = {"LONG": _LONG_PROSE, "SHORT": _SHORT_PROSE, None: _NO_SIDE_PROSE}
    return draft.rng.choice(choices[draft.scene.side])


def _distractions(draft: Draft, most: int) -> list[str]:
    count = draft.rng.choice([0, 0, 1, 1, 2, 3][: most + 3])
    templates = list(draft.rng.sample(_DISTRACT, count))
    if draft.rng.random() < 0.3:
        return [_sentence(draft, t) for t in templates] + [lexicon.filler(draft.rng)]
    return [_sentence(draft, t) for t in templates]


def prose(draft: Draft) -> str:
    """Plain sentences: the position, the situation, and some irrelevant ones."""
    rng, scene = draft.rng, draft.scene
    side = draft.note_position(_sentence(draft, _side_prose(draft)))
    if scene.ticker not in side:
        side = _sentence(draft, rng.choice(_NEWS_SUBJECT)) + " " + side
    rest = [_situation_sentence(draft), *_distractions(draft, 3)]
    if scene.atr:
        rest.append(_sentence(draft, rng.choice(_ATR_PROSE)))
    rng.shuffle(rest)
    sentences = [side, *rest] if rng.random() < 0.75 else [rest[0], side, *rest[1:]]
    return " ".join(sentences)


def news(draft: Draft) -> str:
    """A paragraph of news about the instrument, then the position."""
    rng, scene = draft.rng, draft.scene
    sentences = [_sentence(draft, rng.choice(_NEWS_SUBJECT)), _situation_sentence(draft)]
    sentences += _distractions(draft, 3)
    if scene.atr:
        sentences.append(_sentence(draft, rng.choice(_ATR_PROSE)))
    if rng.random() < 0.5:
        first, *others = sentences
        rng.shuffle(others)
        sentences = [first, *others] if rng.random() < 0.8 else [*others, first]
    if scene.side is not None:
        own = draft.expand(_side_prose(draft))
        if rng.random() < 0.5:
            own = own.replace(
                scene.ticker, rng.choice(("it", "the name", "the stock", "shares", "this one"))
            )
        sentences.insert(
            rng.choice((0, len(sentences), len(sentences))),
            draft.note_position(_sentence(draft, own)),
        )
    return " ".join(sentences)


def shorthand(draft: Draft) -> str:
    """A trading desk's abbreviations."""
    rng, scene = draft.rng, draft.scene
    hand = {"LONG": _LONG_SHORT_HAND, "SHORT": _SHORT_SHORT_HAND, None: ""}[scene.side]
    mark = draft.expand(hand)
    ticker = rng.choice(("", "", "", "", "$", "#")) + scene.ticker
    amount = draft.expand("<q>") if rng.random() < 0.5 else ""
    if mark in ("+", "-"):
        mark, amount = mark + draft.expand("<q>"), ""
    draft.note_position(mark)
    head = rng.choice(
        (
            [mark, amount, ticker],
            [ticker, mark, amount],
            [mark, ticker, amount],
            [amount, ticker, mark],
            [ticker + ":", mark, amount],
            [ticker, amount, mark],
            [ticker + ",", mark, amount],
        )
    )
    start = " ".join(part for part in head if part)
    if rng.random() < 0.6:
        start += draft.expand("{ @ | @| at | from | avg | in | cost |, entry }<e>")
    bits = [draft.expand_phrase(rng.choice(PHRASES[scene.situation].shorthand))]
    extra = (
        "{stp|stop|sl|s/l|st} <e>",
        "{tgt|target|tp|t} <e>",
        "{last|now|mkt|px} <p>",
        "{vs |}<i> <pc>",
        "{vwap|VWAP|ema} <e>",
        "<w>",
        "{trim|hold|cut|add|wdyt|thoughts|what now|roll}?",
        "<hm>",
        "{size|sz} <d>",
        "<pc> {today|tdy|od|wk}",
        "{ping|ask} <who>",
        "{<ac>} {tmrw|<day>|later}",
        "{peer|vs} <o> <pc>",
        "{earnings soon|}",
        "pls {advise|check}",
    )
    bits += [draft.expand(rng.choice(extra)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
    if scene.atr:
        bits.append(draft.expand("{atr|ATR} {<a>%|<a> pct|<a>pc}"))
    rng.shuffle(bits)
    joint = rng.choice((", ", ", ", " ", "; ", " / ", " | ", " - ", ". ", "... "))
    parts = [start, *bits] if rng.random() < 0.85 else [bits[0], start, *bits[1:]]
    text = joint.join(part.strip() for part in parts if part.strip())
    if rng.random() < 0.25:
        text = (
            draft.expand("{hey|morning|quick one|fyi|{<who>}|note|pls|hi all|chat|yo|ok}{:|,| -|}")
            + " "
            + text
        )
    return text


def fields(draft: Draft) -> str:
    """Keys and values in one of the usual notations."""
    rng, scene = draft.rng, draft.scene
    pairs = [(draft.expand(_TICKER_KEYS), scene.ticker)]
    values = {"LONG": _LONG_VALUES, "SHORT": _SHORT_VALUES, None: _NO_SIDE_VALUES}[scene.side]
    if scene.side is not None or rng.random() < 0.4:
        pairs.append((draft.expand(_SIDE_KEYS), draft.note_position(draft.expand(values))))
    key, value = rng.choice(PHRASES[scene.situation].fields)
    pairs.append((draft.expand_phrase(key), draft.expand_phrase(value)))
    if scene.atr:
        pairs.append(
            (
                draft.expand(_ATR_KEYS),
                draft.expand("{<a>|<a>%}") if rng.random() < 0.5 else scene.atr,
            )
        )
    for key, value in rng.sample(_NOISE_FIELDS, rng.randrange(0, 7)):
        pairs.append((draft.expand(key), draft.expand(value)))
    order = rng.random()
    if order < 0.5:
        head, tail = pairs[:2], pairs[2:]
        rng.shuffle(tail)
        pairs = head + tail
    else:
        rng.shuffle(pairs)
    if rng.random() < 0.2:
        pairs = [(key.upper(), value) for key, value in pairs]
    return _write_fields(draft, pairs)


def _write_fields(draft: Draft, pairs: list[tuple[str, str]]) -> str:
    rng = draft.rng
    kind = rng.random()
    if kind < 0.12:
        return json.dumps(dict(pairs), indent=rng.choice((None, None, 1, 2)))
    if kind < 0.2:
        inner = ", ".join(f"{key}: {value}" for key, value in pairs)
        return rng.choice(("{%s}", "(%s)", "[%s]", "%s")) % inner
    if kind < 0.28:
        lines = "\n".join(f"{key}{rng.choice((' = ', '='))}{value}" for key, value in pairs)
        return draft.expand("[{<w>|trade|position|{<ac>}|order}]\n") + lines
    assign = rng.choice(("=", "=", "=", ":", ": ", ": ", " = ", "->", " "))
    joint = rng.choice((" ", " ", "\n", "\n", "|", " | ", ";", "; ", ", ", ",", "\t", " // ", "^"))
    quote = rng.choice(("", "", "", '"', "'"))
    if assign == " " and joint == " ":
        assign = "="
    body = joint.join(f"{key}{assign}{quote}{value}{quote}" for key, value in pairs)
    if rng.random() < 0.25:
        body = (
            draft.expand(
                "{<hm>:12 INFO |<hm> |2025-1<d> <hm> |[<w>] |LOG <w>: |{pos|position|alert|update|snapshot|trade} |8=FIX.4.4\\||> |# <w>\n|---\n|- }"
            )
            + body
        )
    if rng.random() < 0.15:
        body += draft.expand(
            "{\n| }{what now?|please advise|adjust?|comment: <w>|# <w>|any change?}"
        )
    return body


_COLUMNS: Final = (
    "time",
    "px",
    "last",
    "bid",
    "ask",
    "vol",
    "volume",
    "chg%",
    "rsi",
    "vwap",
    "size",
    "open",
    "high",
    "low",
    "close",
    "qty",
    "trades",
    "ema",
)


def table(draft: Draft) -> str:
    """Rows pasted from a screen, and a line about the position."""
    rng, scene = draft.rng, draft.scene
    kind = rng.random()
    if kind < 0.45:
        rows, mentioned = _ticks(draft)
    elif kind < 0.75:
        rows, mentioned = _positions(draft)
    else:
        rows, mentioned = _indicators(draft)
    text = _write_table(draft, rows)
    notes = [_remark(draft)]
    if not mentioned:
        notes.append(_held(draft))
    if scene.atr:
        notes.append(draft.expand("{ATR|atr|atr%|daily ATR}{:| |=| is }<a>%"))
    if rng.random() < 0.3:
        notes.append(draft.expand(rng.choice(_DISTRACT)))
    rng.shuffle(notes)
    before = [note for note in notes if rng.random() < 0.5]
    after = [note for note in notes if note not in before]
    joint = rng.choice(("\n", "\n", ". ", " - ", "; "))
    if scene.ticker not in text and not any(scene.ticker in note for note in notes):
        before.insert(
            0,
            draft.expand(
                "{<t>|<t>:|<t> ticks|ticks <t>|{tape|prints|bars|quotes} {for |of |}<t>|== <t> ==|# <t>|symbol <t>|{1m|5m|15m|1h|daily} <t>}"
            ),
        )
    return "\n".join(part for part in (joint.join(before), text, joint.join(after)) if part)


def _remark(draft: Draft) -> str:
    phrases = PHRASES[draft.scene.situation]
    return draft.expand_phrase(
        draft.rng.choice(phrases.shorthand if draft.rng.random() < 0.5 else phrases.sentences)
    )


def _held(draft: Draft) -> str:
    scene, rng = draft.scene, draft.rng
    if scene.side is None:
        return draft.expand(
            "{<t>|<t> only|re <t>|{focus|look at|about} <t>|{no position|flat|watching} <t>|symbol <t>}"
        )
    if rng.random() < 0.4:
        return draft.note_position(draft.expand(_side_prose(draft)))
    hand = _LONG_SHORT_HAND if scene.side == "LONG" else _SHORT_SHORT_HAND
    mark = draft.expand(hand)
    if mark in ("+", "-"):
        mark += draft.expand("<q>")
    draft.note_position(mark)
    return draft.expand(
        rng.choice(("{we are |we're |pos: |position: |holding: |held: |book: |status: |}", ""))
        + rng.choice(
            (
                f"{mark} <t>{{ from <e>| @ <e>|}}",
                f"<t> {mark}{{ <q>|}}{{ from <e>|}}",
                f"{mark} {{<q> |}}<t>",
            )
        )
    )


def _ticks(draft: Draft) -> tuple[list[list[str]], bool]:
    rng, scene = draft.rng, draft.scene
    columns = rng.sample(_COLUMNS, rng.randrange(2, 5))
    with_symbol = rng.random() < 0.4
    level = scene.price
    rows = [([draft.expand(_TICKER_KEYS)] if with_symbol else []) + columns]
    for _ in range(rng.randrange(2, 6)):
        level *= rng.uniform(0.99, 1.01)
        cells = [_cell(rng, column, level) for column in columns]
        rows.append(([scene.ticker] if with_symbol else []) + cells)
    return (rows if rng.random() < 0.8 else rows[1:]), False


def _cell(rng: Random, column: str, level: float) -> str:
    if column == "time":
        return f"{rng.randrange(8, 22):02d}:{rng.randrange(60):02d}" + rng.choice(("", ":30"))
    if column in ("vol", "volume", "size", "qty", "trades"):
        return quantity(rng)
    if column == "chg%":
        return percent(rng)
    if column == "rsi":
        return str(rng.randrange(31, 69))
    return f"{level:.2f}"


def _positions(draft: Draft) -> tuple[list[list[str]], bool]:
    rng, scene = draft.rng, draft.scene
    values = {"LONG": _LONG_VALUES, "SHORT": _SHORT_VALUES, None: _NO_SIDE_VALUES}[scene.side]
    header, row = [draft.expand(_TICKER_KEYS)], [scene.ticker]
    if scene.side is not None or rng.random() < 0.3:
        header.append(draft.expand(_SIDE_KEYS))
        row.append(draft.note_position(draft.expand(values)))
    for key, value in rng.sample(_NOISE_FIELDS[:11], rng.randrange(1, 5)):
        header.append(draft.expand(key))
        row.append(draft.expand(value))
    order = list(range(len(header)))
    if rng.random() < 0.4:
        rng.shuffle(order)
    header, row = [header[i] for i in order], [row[i] for i in order]
    return ([header, row] if rng.random() < 0.85 else [row]), True


def _indicators(draft: Draft) -> tuple[list[list[str]], bool]:
    rng = draft.rng
    rows = [["indicator", "value"]] if rng.random() < 0.5 else []
    names = rng.sample(
        (
            "VWAP",
            "EMA20",
            "SMA50",
            "bid",
            "ask",
            "last",
            "open",
            "high",
            "low",
            "beta",
            "MACD",
            "OBV",
        ),
        rng.randrange(2, 6),
    )
    rows += [[name, f"{draft.scene.price * rng.uniform(0.9, 1.1):.2f}"] for name in names]
    if rng.random() < 0.5:
        key, value = rng.choice(PHRASES[draft.scene.situation].fields)
        rows.insert(
            rng.randrange(1, len(rows) + 1), [draft.expand_phrase(key), draft.expand_phrase(value)]
        )
    return rows, False


def _write_table(draft: Draft, rows: list[list[str]]) -> str:
    rng = draft.rng
    kind = rng.random()
    if kind < 0.25:
        return "\n".join(rng.choice((",", ", ")).join(row) for row in rows)
    if kind < 0.4:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        return "\n".join(lines)
    if kind < 0.75:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        gap = rng.choice((" ", "  ", "   "))
        just = str.ljust if rng.random() < 0.6 else str.rjust
        return "\n".join(
            gap.join(just(c, w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )
    joint = rng.choice(("\t", ";", " | ", "|", " / "))
    return "\n".join(joint.join(row) for row in rows)


LAYOUTS: Final[tuple[Callable[[Draft], str], ...]] = (prose, news, shorthand, fields, table)

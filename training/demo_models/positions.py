"""The first writer's templates about the position, for `templates.expand`.

Sentences name the instrument (`<t>`) and the side. Tags and field values state only the side. Other
tables name the instrument without a side, or use words of a side for something else.
"""

from __future__ import annotations

import re
from typing import Final

from training.demo_models.situations import Side

_AT = "{| from <entry>| at <entry>| @ <entry>| since <when>| entered at <entry>|, entry <entry>|, avg <entry>}"
_WE = (
    "{we are|we're|i am|i'm|im|desk is|the fund is|the book is|the client is|account <acc> is|we "
    "remain|we stay|still|currently|now|we have been|we went|i went|fund went|<name> is|team is}"
)
_WHO = "{we|i|the fund|the desk|the client|<name>|they|our PM|the trader|our team|my boss}"
_OUR = "{our|my|the|this|an existing|a|the open|<name>'s|the fund's|the desk's|an open}"
_QTY = (
    "{|<qty> |<qty> {shares|sh|lots|units|contracts|shs} |<qty> {shares|units|lots|contracts} of }"
)
_POSITION = "{position|trade|exposure|holding|bet|stake|idea|leg|pos}"

SENTENCES: Final[dict[Side, tuple[str, ...]]] = {
    "LONG": (
        f"{_WE} {{|net |outright |modestly |heavily |small |very }}long {_QTY}<t>{_AT}",
        f"{_WE} {{|net |outright |modestly |heavily |small |very }}long {_QTY}<t>{_AT}",
        f"{_WHO} {{bought|purchased|picked up|accumulated|scooped up|loaded up on|grabbed|went long|"
        f"got long|added to a long in|took a long in}} {_QTY}<t>{_AT}",
        f"{_WHO} {{own|owns|hold|holds|are holding|have been holding|have|bought and hold|keeps}} "
        f"{_QTY}<t>{_AT}",
        f"{_OUR} {{<qty>-share |}}long {_POSITION} in <t>{_AT}",
        f"{_OUR} {{long <t>|<t> long}} {_POSITION}{_AT}",
        f"{_OUR} {{<t> long|<t> longs|long in <t>|long <t>}}{_AT}",
        "{opened|initiated|started|put on|established|took|holding|running|carrying|have on|manage|"
        f"review|protect}} {{a|our|the|my}} {{|small |large |new |core }}long {{{_POSITION} |}}"
        f"{{in|on}} <t>{_AT}",
        f"{{long|LONG|Long}} {_QTY}<t>{_AT}",
        f"{{bought|bot|buy|BUY|Bought|BOT|BOUGHT}} {_QTY}<t>{_AT}",
        f"<t> {{long|LONG|longs|, long|(long)|- long|: long|is a long|is held long}}{_AT}",
        f"{_WE} {{bullish on|bulls on|betting on a rise in|betting on higher <t>, ticker|positioned "
        f"for upside in|positioned for higher prices in|buyers of|the owner of|owners of}} <t>{_AT}",
        f"{{a|our|my|the}} {{bullish|upside}} {_POSITION} {{in|on}} <t>{_AT}",
        f"{_QTY}<t> {{bought|purchased|acquired|were bought|was bought|went in on the long side}}"
        f"{_AT}",
        f"{_WHO} {{bought the dip in|is in <t> on the long side, that is|stay with the long in|want "
        f"to keep the long in|like being long}} <t>",
        f"{{the position|position|this|it|exposure}} {{is|:}} {{a long|long|net long|LONG}} {{in|of}}"
        f" <t>{_AT}",
    ),
    "SHORT": (
        f"{_WE} {{|net |outright |modestly |heavily |small |very }}short {_QTY}<t>{_AT}",
        f"{_WE} {{|net |outright |modestly |heavily |small |very }}short {_QTY}<t>{_AT}",
        f"{_WHO} {{shorted|sold short|went short|got short|added to a short in|took a short in|sold|"
        f"borrowed and sold|short-sold|are short selling}} {_QTY}<t>{_AT}",
        f"{_WHO} {{is short|are short|have shorted|have sold short|keep a short in|has a short in|"
        f"hold a short in|hold short|holds short|runs a short in}} {_QTY}<t>{_AT}",
        f"{_OUR} {{<qty>-share |}}short {_POSITION} in <t>{_AT}",
        f"{_OUR} {{short <t>|<t> short}} {_POSITION}{_AT}",
        f"{_OUR} {{<t> short|<t> shorts|short in <t>|short <t>}}{_AT}",
        "{opened|initiated|started|put on|established|took|holding|running|carrying|have on|manage|"
        f"review|protect}} {{a|our|the|my}} {{|small |large |new |core }}short {{{_POSITION} |}}"
        f"{{in|on}} <t>{_AT}",
        f"{{short|SHORT|Short}} {_QTY}<t>{_AT}",
        f"{{sold|sold short|sell short|shrt|SOLD SHORT|Sold|SELL|shorted|SLD}} {_QTY}<t>{_AT}",
        f"<t> {{short|SHORT|shorts|, short|(short)|- short|: short|is a short|is held short}}{_AT}",
        f"{_WE} {{bearish on|bears on|betting against|betting on a fall in|betting on lower <t>, "
        f"ticker|positioned for downside in|positioned for lower prices in|sellers of|fading}} "
        f"<t>{_AT}",
        f"{{a|our|my|the}} {{bearish|downside}} {_POSITION} {{in|on|against}} <t>{_AT}",
        f"{_QTY}<t> {{sold short|shorted|borrowed and sold|were sold|was sold short|went out on the "
        f"short side}}{_AT}",
        f"{_WHO} {{sold the rally in|is in <t> on the short side, that is|stay with the short in|want"
        f" to keep the short in|like being short}} <t>",
        f"{{the position|position|this|it|exposure}} {{is|:}} {{a short|short|net short|SHORT}} "
        f"{{in|of}} <t>{_AT}",
    ),
}

BARE_SENTENCES: Final = (
    "{a look at|looking at|watching|on the screen:|regarding|on|re|about|as for|update on} <t>",
    "{what about|what do you make of|thoughts on|any view on|how does it look for} <t>",
    "<t> {trades|is trading|changed hands|last traded|is quoted} at <price>",
    "{review|check|please look at|assess|consider|update} {the|our|my} {position|trade|levels} in <t>",
    "{position|trade|name|instrument|focus|ticker|subject|symbol} {is|:} <t>",
    "{our|my|the} <t> {position|trade|line|exposure}",
)
"""Name the instrument without a side."""

SIDE_AFTER: Final[dict[Side, tuple[str, ...]]] = {
    "LONG": (
        "{we are|we're|i am|desk is|fund is|position is|we stay|the book is} {|net |still }long"
        "{ it| here| the name|}{, <qty> {shares|sh|units}|}",
        "{direction|side|bias|exposure|stance}{:| is} {long|LONG|the long side|bullish}",
        "{we|i|the desk|<name>} {bought|own|hold|bought into} {it|the stock|<qty> {shares|units|of "
        "it}}{| {at|from} <entry>}",
        "{it is|that is|this is|ours is} {a|the} {long|long position|bullish bet}",
        "{long|Long|bought|bot} <qty>{| at <entry>}",
        "{the|our} long {is from|was opened at} <entry>",
    ),
    "SHORT": (
        "{we are|we're|i am|desk is|fund is|position is|we stay|the book is} {|net |still }short"
        "{ it| here| the name|}{, <qty> {shares|sh|units}|}",
        "{direction|side|bias|exposure|stance}{:| is} {short|SHORT|the short side|bearish}",
        "{we|i|the desk|<name>} {shorted|sold|sold short|are short of} {it|the stock|<qty> {shares|"
        "units|of it}}{| {at|from} <entry>}",
        "{it is|that is|this is|ours is} {a|the} {short|short position|bearish bet}",
        "{short|Short|sold|sold short} <qty>{| at <entry>}",
        "{the|our} short {is from|was opened at} <entry>",
    ),
}
"""State the side, after another sentence named the instrument."""

TAGS: Final[dict[Side, str]] = {
    "LONG": "{long|lng|LONG|Lng|L|lg|bot|B|buy|bought|BUY|BOT|bull|long <qty>|+<qty>|L<qty>|"
    "bot <qty>|lng <qty>|long <qty> sh|bto|BTO|net long|bullish|own <qty>|holding <qty>|LNG|"
    "+<qty>sh}",
    "SHORT": "{short|shrt|SHORT|sht|S|sld|ss|SS|sell|sold|SELL|SLD|bear|short <qty>|-<qty>|S<qty>|"
    "sld <qty>|shrt <qty>|short <qty> sh|sto|STO|net short|bearish|ss <qty>|sold <qty>|"
    "sold short <qty>|SHRT|-<qty>sh}",
}
"""Abbreviations of a trading desk."""

FIELD_KEYS: Final = (
    "{side|Side|SIDE|direction|dir|Direction|position|pos|Position|pos_side|bias|way|stance|exposure|"
    "trade|L/S|ls|B/S|buy_sell|bs|order_side|book|leg|position_type|posn|position_side|trade_side|"
    "type|ord|sd|d|action_taken|holding|trade_type|open_position|our_side|long_short|we_are}"
)
FIELD_VALUES: Final[dict[Side, str]] = {
    "LONG": "{long|LONG|Long|L|buy|BUY|Buy|B|bot|bought|BOT|bull|bullish|net long|BTO|lng|Bought|"
    "BOUGHT|long_only|LNG|long|LONG|BUY|buy}",
    "SHORT": "{short|SHORT|Short|S|sell|SELL|Sell|sold|SLD|sld|SS|bear|bearish|net short|STO|shrt|"
    "sell_short|SELL_SHORT|sell short|SSHORT|short|SHORT|SELL|sell}",
}
SIGNED_KEYS: Final = (
    "{qty|size|pos|position|net|net_qty|shares|units|lots|contracts|exposure|holding|quantity|Qty|"
    "POS|net_pos|posn|signed_qty|Position|inventory}"
)

SIDE_WORDS: Final[dict[str, re.Pattern[str]]] = {
    "LONG": re.compile(
        r"(?i)(?<![a-z])(?:longs?(?:_only)?(?!-?[a-z]|-?_? ?term)|lng|lg|bot|bought|buy(?:ers?)?|bto|bull(?:s|ish)?"
        r"|owns?|owners?|holds?|holding|have|keeps|purchased|picked up|accumulated|scooped up|loaded up|grabbed|added"
        r"|acquired|upside|higher|rise|rises|goes up|climbs|rallies|b|l(?=\b|\d))(?![a-z])"
        r"|(?<=\b54=)1\b|(?<![\w.])\+\d+(?:,\d{3})*k?(?![\d%]|[.,]\d)"
    ),
    "SHORT": re.compile(
        r"(?i)(?<![a-z])(?:short(?:s|ed|-sold| selling)?(?!-?[a-z]|-?_? ?term)|shrt|sht|sold|sld|sell(?:er|ers)?"
        r"|sell_short|ss|s?short|sto|bear(?:s|ish)?|faded|fading|against|downside|lower|fall|falls|goes down|drops"
        r"|slides|borrowed|s(?=\b|\d))(?![a-z])"
        r"|(?<=\b54=)2\b|(?<![\w.])-\d+(?:,\d{3})*k?(?![\d%]|[.,]\d)"
    ),
}
"""Match words that state a side in a phrase about the position."""

STOPS: Final[dict[Side, str]] = {
    "LONG": "{stop {at|is|sits at|rests at|=|:|in at} <stop_below>|sell stop {at|} <stop_below>|sl "
    "<stop_below>|stop loss <stop_below>{, target <stop_above>|}|stp <stop_below> tgt <stop_above>|"
    "protective sell order at <stop_below>|we sell out below <stop_below>}",
    "SHORT": "{stop {at|is|sits at|rests at|=|:|in at} <stop_above>|buy stop {at|} <stop_above>|sl "
    "<stop_above>|stop loss <stop_above>{, target <stop_below>|}|stp <stop_above> tgt <stop_below>|"
    "cover {above|at} <stop_above>|we buy it back above <stop_above>|protective buy order at "
    "<stop_above>}",
}

MISLEADING: Final = (
    "{buyers|sellers|shorts|longs} {were|are} {active|trapped|absent|in control} {early|at the open|}",
    "short interest {is|stands at|fell to} <small>% {of the float|}",
    "{long-term|short-term|longer term|in the short run} {investors|holders|outlook|yields} {are|is} "
    "{calm|unchanged|nervous|mixed}",
    "{all day long|it was a long session|a short day|shortly before the close|before long|in short, a "
    "mixed tape|as long as it holds, fine}",
    "{analysts|the broker|<name>|a broker} {rate it|has it at|say} {buy|sell|a buy|a sell|hold}",
    "the {sell|buy}-side {is|was} {divided|quiet|cautious}",
    "{the market|<index>|the sector|<peer>} {sold off|was bought|saw buying|saw selling|was short of "
    "ideas} {today|early|this week|}",
    "{short covering|a short squeeze|dip buying|profit taking|a sell-off|long liquidation} {was seen|"
    "is possible|is talked about|came earlier}",
    "{insiders|a director|<name>} {bought|sold} {shares|a few thousand|stock} {last month|in May|}",
    "{long|short} {queue|list|story|wait|notice} {today|again|}",
)
"""Use words of a side, but say nothing about the position."""

NOISE: Final = (
    "{<index>|ES|futures|the index|the dollar} {is|are} {up|down|flat|+|-} <small>%",
    "{RSI|rsi} {at |is |}<neutral_rsi>",
    "{RSI|rsi} {at |is |}<neutral_rsi>",
    "{volume|vol} {is |}{normal|average|in line|as usual}",
    "{beta|correlation} {is |}0.<d><d>",
    "{sector|peers|<peer>} {is|are} {mixed|flat|steady}",
    "{VWAP|vwap} {at |}<price>",
    "{peer|rival|competitor|sector mate} <peer> {is|was|trades} {flat|up <small>%|down <small>%}",
    "{benchmark|hedge ratio|reference|index} {is |}<index>",
    "{risk|R} {per trade |}is <d>k {USD|EUR|}",
    "{per|says|said|via|cc} {<name>|<acronym>}",
    "{the |}<acronym> {was|is} {unchanged|<small>}",
    "{last|mark|px|price|mid} {is |at |}<price>",
    "{entry|avg|avg px|cost} {was |at |}<entry>",
    "{time|as of|ts} <time>",
    "{VIX|vix} {at |}<small>",
    "{please advise|what now|your call|action?|"
    "what should we do|thoughts|suggestions welcome|comments please|stop and target?|adjust?}",
    "{ref|acct|book|account|id|order} <acc>",
    "{we review|next review|check back} {at|by} <time>",
    "{EMA|SMA|20dma|the 50-day} {at|is} <price>",
    "{size|position} is {normal|half|full|small}",
    "{should we|should i|do we|can you} {move|adjust|tighten|change|review} {the|our} {stop|levels|"
    "stop and target}",
    "{holding period|age} {is |}<d> days",
    "{it is|today is} {Monday|Tuesday|Wednesday|Thursday|Friday}",
    "{float|market cap} {is |}<d><d> {bn|million}",
    "{yield|carry} <small>%",
)
"""Irrelevant remarks."""

ATR: Final = (
    "{ATR|atr|the ATR|ATR(14)|average true range|daily range|avg range|14-day ATR} {is |at |of |=|:||}"
    "{<atr>%|<atr> %|<atr>pct|<atr> percent}"
)

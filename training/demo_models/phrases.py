"""Both writers' wordings of each situation, as templates: sentences, shorthand and fields.

`<n>` is the situation's number. A wording without it states no number, and the answer then has
none either. Fields are key and value.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Phrases(NamedTuple):
    """The wordings of one situation."""

    sentences: tuple[str, ...]
    shorthand: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]


_NAME = "{the name|it|the stock|the instrument|price|this one|the tape|<t>|the chart|the market}"
_OTC = "{chart|technical|indicator|momentum|daily|hourly|weekly|intraday}"

PHRASES: Final[dict[str, Phrases]] = {
    "overbought": Phrases(
        (
            f"{_NAME} {{is|looks|seems|got|is getting|has become}} {{very |clearly |badly |quite |}}"
            "{overbought|overextended|overheated|stretched to the upside|frothy|toppy|extended}",
            "{the |14-day |daily |hourly |}RSI {is at|at|reads|sits at|is|hit|prints|=|climbed to|"
            "has reached|above the band at} <n>{ and overbought| and rolling over|, stretched|}",
            f"{_OTC} {{oscillators|readings|stochastics}} are {{overbought|stretched|overheated}}",
            "{came|ran} {too far too fast|a long way up in a short time|vertical}, {overbought|"
            "extended far above its averages|stretched} {by any measure|on every timeframe|}",
            "{the rally|the run-up|the climb} {looks exhausted|is overdone|is tired|is stretched}",
        ),
        (
            "rsi <n>",
            "RSI <n> hot",
            "rsi:<n>",
            "rsi(14) <n>",
            "OB rsi <n>",
            "overbought",
            "ovrbt",
            "o/b",
            "stretched",
            "overextended",
            "toppy",
            "xtended",
            "hot, rsi <n>",
            "RSI=<n>",
        ),
        (
            ("{rsi|RSI|rsi14|rsi_14|RSI(14)|rsi_d|momentum_rsi}", "<n>"),
            ("{rsi|RSI|rsi14}", "<n>"),
            (
                "{signal|state|note|condition|technicals|flag|remark|setup}",
                "{overbought|OVERBOUGHT|overextended|stretched up|too hot|rsi <n>|RSI <n>}",
            ),
        ),
    ),
    "oversold": Phrases(
        (
            f"{_NAME} {{is|looks|seems|got|is getting|has become}} {{very |clearly |badly |quite |}}"
            "{oversold|washed out|stretched to the downside|sold out|deeply oversold}",
            "{the |14-day |daily |hourly |}RSI {is at|at|reads|sits at|is|hit|prints|=|fell to|"
            "dropped to|has sunk to} <n>{ and oversold| and turning up|, washed out|}",
            f"{_OTC} {{oscillators|readings|stochastics}} are {{oversold|washed out}}",
            "{the selling|the decline|the slide} {looks exhausted|is overdone|is oversold}",
            "{fell|dropped} {too far too fast|a long way in a short time}, oversold {now|by any "
            "measure|on every timeframe|}",
        ),
        (
            "rsi <n>",
            "RSI <n> cold",
            "rsi:<n>",
            "rsi(14) <n>",
            "OS rsi <n>",
            "oversold",
            "ovrsld",
            "o/s",
            "washed out",
            "deep oversold",
            "RSI=<n>",
            "oversold rsi <n>",
        ),
        (
            ("{rsi|RSI|rsi14|rsi_14|RSI(14)|rsi_d|momentum_rsi}", "<n>"),
            ("{rsi|RSI|rsi14}", "<n>"),
            (
                "{signal|state|note|condition|technicals|flag|remark|setup}",
                "{oversold|OVERSOLD|washed out|deeply oversold|rsi <n>|RSI <n>}",
            ),
        ),
    ),
    "broke_support": Phrases(
        (
            f"{_NAME} {{broke|lost|fell through|closed below|cracked|sliced through|gave up|is under"
            "|slipped below|has broken} {support|the support|key support|its floor|the neckline|"
            "the 200-day|the 50-day average|the range low} {at <n>|near <n>|of <n>|}",
            "{support|the floor|the range low} {at <n> |}{gave way|is gone|failed|broke|did not "
            "hold|has cracked|was taken out}{ on volume|}",
            "{a|} {breakdown|break lower} {below <n>|under <n>|through support|out of the range}",
        ),
        (
            "broke supp <n>",
            "lost <n> support",
            "below supp",
            "broke support",
            "thru support <n>",
            "supp <n> gone",
            "brk dn <n>",
            "breakdown",
            "under 200dma",
            "lost the 50d",
            "<n> broke",
        ),
        (
            (
                "{signal|state|note|event|pattern|technicals|flag|setup|trigger}",
                "{broke support|support broken|breakdown|broke support <n>|lost support|BREAKDOWN|"
                "close below support|support_break|broke 200dma}",
            ),
            ("{broken_support|support_broken|lost_support|support_lost}", "<n>"),
        ),
    ),
    "breakout": Phrases(
        (
            f"{_NAME} {{broke|cleared|took out|closed above|pushed through|is over|went through|has "
            "broken} {resistance|the resistance|key resistance|its ceiling|the range high|"
            "the prior high|a year's high} {at <n>|near <n>|of <n>|}",
            "{resistance|the ceiling|the range high} {at <n> |}{gave way|is gone|was cleared|broke|"
            "has been taken out}{ on volume|}",
            "{a|} {breakout|break higher} {above <n>|over <n>|through resistance|out of the range|"
            "to new highs}",
        ),
        (
            "broke res <n>",
            "cleared <n>",
            "above res",
            "broke resistance",
            "thru resistance <n>",
            "res <n> gone",
            "b/o <n>",
            "breakout",
            "new highs",
            "brkout <n>",
            "took out <n>",
        ),
        (
            (
                "{signal|state|note|event|pattern|technicals|flag|setup|trigger}",
                "{broke resistance|resistance broken|breakout|broke resistance <n>|new high|BREAKOUT|"
                "close above resistance|resistance_break}",
            ),
            ("{broken_resistance|resistance_broken|cleared_resistance}", "<n>"),
        ),
    ),
    "bad_news": Phrases(
        (
            "{shares|stock|it|<t>|the price} {fell|dropped|slid|tumbled|sank|lost|plunged|is down} "
            "{<n>%|<n> percent|<n> pct|sharply|hard} {after|on|following|as} {a profit warning|"
            "a guidance cut|a downgrade|a fraud probe|a product recall|a trial failure|weak results|"
            "an earnings miss|a lawsuit|a data breach|the loss of a key customer|a dividend cut|"
            "a regulator's fine|a failed merger|the CEO's exit|an accounting scandal}",
            "{the company|management|it} {cut its outlook|lowered guidance|warned on profit|missed "
            "estimates|recalled its main product|lost its largest contract|halted its dividend}",
            "{downgraded|cut} {to sell|to underweight|to underperform} by {a broker|two brokers}",
        ),
        (
            "profit warning",
            "guide cut",
            "missed, -<n>%",
            "down <n>% on miss",
            "downgrade",
            "bad print",
            "bad news",
            "off <n>% on dg",
            "-<n>% on recall",
            "neg headline",
            "warning",
        ),
        (
            (
                "{news|headline|event|catalyst|note|story|headlines}",
                "{profit warning|guidance cut|downgrade|negative|bad|earnings miss|recall|lawsuit|"
                "probe|negative, -<n>%|fell <n>% on a miss|CUT|fraud probe}",
            ),
        ),
    ),
    "good_news": Phrases(
        (
            "{shares|stock|it|<t>|the price} {rose|jumped|climbed|surged|gained|soared|rallied|is "
            "up} {<n>%|<n> percent|<n> pct|sharply|hard} {after|on|following|as} {an upgrade|"
            "raised guidance|a takeover bid|a record order|strong results|an earnings beat|"
            "a drug approval|a new buyback|a contract win|a settled lawsuit|a higher dividend|"
            "an index inclusion|a patent victory|a new partner}",
            "{the company|management|it} {raised its outlook|lifted guidance|beat estimates|won its "
            "largest contract ever|announced a large buyback|got its drug approved}",
            "{upgraded|raised} {to buy|to overweight|to outperform} by {a broker|two brokers}",
        ),
        (
            "guide raise",
            "beat, +<n>%",
            "up <n>% on beat",
            "upgrade",
            "good print",
            "good news",
            "+<n>% on ug",
            "+<n>% takeover bid",
            "pos headline",
            "bid rumour, +<n>%",
            "strong #s",
        ),
        (
            (
                "{news|headline|event|catalyst|note|story|headlines}",
                "{upgrade|guidance raised|positive|good|earnings beat|takeover bid|contract win|"
                "approval|positive, +<n>%|rose <n>% on a beat|RAISED|buyback}",
            ),
        ),
    ),
    "near_stop": Phrases(
        (
            "{the price|it|<t>|last} is {only |just |}<n>{%| percent| pct} {from|away from|off} "
            "{the|our|my|its} {stop|stop loss|stop-loss|exit level}",
            "{we are|it is|price is|it trades} {close to|right at|near|hugging|almost at|about to "
            "hit|knocking on} {the|our|my} {stop|stop-loss|stop loss|stop level}",
            "{the|our|my} stop is {in danger|about to go|very close|<n>% away|within reach}",
        ),
        (
            "<n>% to stop",
            "nr stop",
            "near stop",
            "close to stop",
            "stop <n>% away",
            "almost stopped",
            "stp <n>% off",
            "abt to stop out",
            "at the stop",
        ),
        (
            ("{dist_to_stop|stop_dist|to_stop|stop_distance|distance_stop}", "<n>{%||pct}"),
            (
                "{note|state|alert|flag|remark}",
                "{near stop|close to stop|stop near|NEAR_STOP|<n>% to stop}",
            ),
        ),
    ),
    "near_target": Phrases(
        (
            "{the price|it|<t>|last} is {only |just |}<n>{%| percent| pct} {from|away from|off} "
            "{the|our|my|its} {target|profit target|take profit|objective|price target}",
            "{we are|it is|price is|it trades} {close to|right at|near|almost at|about to "
            "hit|knocking on} {the|our|my} {target|profit target|objective|take-profit}",
            "{the|our|my} target is {in sight|nearly there|very close|<n>% away|within reach}",
        ),
        (
            "<n>% to tgt",
            "nr tgt",
            "near target",
            "close to TP",
            "tgt <n>% away",
            "almost at tp",
            "TP <n>% off",
            "abt to hit target",
            "at the target",
        ),
        (
            ("{dist_to_target|target_dist|to_target|target_distance|to_tp}", "<n>{%||pct}"),
            (
                "{note|state|alert|flag|remark}",
                "{near target|close to target|target near|NEAR_TARGET|<n>% to target}",
            ),
        ),
    ),
    "earnings": Phrases(
        (
            "{earnings|results|quarterly results|the report|Q<d> numbers|its earnings|the quarter} "
            "{are|is|come|comes|land|due} {due |out |}in <n> {days|sessions|trading days}",
            "{earnings|results|quarterly numbers|the print} {are|come out|is due|drop} {tomorrow|"
            "tonight|after the close|next week|before the open|on Thursday|soon|shortly|this week}",
            "{reports|it reports|the company reports} {in <n> days|tomorrow|tonight|next week|soon}",
            "we are {going|heading} into {earnings|the print|results}",
        ),
        (
            "ER <n>d",
            "earnings <n>d",
            "er in <n> days",
            "EPS tmrw",
            "prints tonite",
            "into print",
            "earnings tmrw",
            "rpt in <n>d",
            "ern <n>d out",
            "results soon",
            "er amc",
        ),
        (
            (
                "{earnings|earnings_in|days_to_earnings|next_earnings|er|ER|report}",
                "{<n>|<n>d|<n> days|in <n> days|tomorrow|tonight|after close}",
            ),
            (
                "{event|catalyst|note|calendar|upcoming}",
                "{earnings in <n>d|earnings tomorrow|earnings|results in <n> days|EARNINGS|ER <n>d}",
            ),
        ),
    ),
    "macro": Phrases(
        (
            "{CPI|FOMC|payrolls|the Fed|the ECB|the rate decision|NFP|GDP|PPI|the BOJ|PMIs} {is|are|"
            "comes|due} {out |}in <n> {hours|hrs|h}",
            "{CPI|the FOMC|payrolls|the Fed meeting|the ECB|the rate decision|NFP|the BOJ} {is|are|"
            "comes} {tomorrow|later today|this afternoon|tonight|on the calendar|next|soon}",
            "{we are|market is} {waiting for|ahead of|in front of} {CPI|the FOMC|payrolls|the Fed|"
            "a rate decision|NFP|the central bank}",
        ),
        (
            "CPI <n>h",
            "FOMC in <n>h",
            "nfp tmrw",
            "fed <n>hrs",
            "pre CPI",
            "ahead of fomc",
            "macro <n>h",
            "ECB <n>h away",
            "cpi tmrw",
            "rate decision <n>h",
            "fed tonite",
        ),
        (
            (
                "{event|catalyst|calendar|upcoming|macro|next_event}",
                "{CPI in <n>h|FOMC|FOMC in <n> hours|payrolls|CPI|NFP tomorrow|rate decision|ECB}",
            ),
            ("{hours_to_event|macro_in|hours_to_fomc|hours_to_cpi}", "<n>{h|}"),
        ),
    ),
    "trend": Phrases(
        (
            "{the |its |}{trend|primary trend|trend structure} {is|remains|stays|looks|still} "
            "{intact|healthy|in our favour|in place|strong|unbroken|firm}{, ADX <n>| with ADX at "
            "<n>|}",
            "{ADX|the ADX} {is|at|reads|stands at} <n>{, a strong trend|, trending|}",
            f"{_NAME} {{keeps trending|is trending well|follows its trend|respects the trendline|"
            "rides the 20-day average}",
            "{everything|all} {is going to plan|is on track|works as planned|goes our way}",
        ),
        (
            "trend ok",
            "trend intact",
            "adx <n>",
            "ADX <n>",
            "trending",
            "on track",
            "trnd gd adx <n>",
            "trend fine",
            "strong trend",
            "as planned",
        ),
        (
            ("{trend|trend_state|regime|structure}", "{intact|healthy|strong|up and intact|ok}"),
            ("{adx|ADX|adx14}", "<n>"),
            ("{note|state|flag|remark}", "{trend intact|trending|on track|trend healthy}"),
        ),
    ),
    "low_volume": Phrases(
        (
            "{volume|turnover|activity|participation} {is|runs|came in|was|fell} {<n>%|<n> percent|"
            "<n> pct} {below|under|lower than} {average|normal|its average|the 20-day mean|usual}",
            "{volume|turnover|participation|interest} {is|keeps} {drying up|fading|thin|dwindling|"
            "very light|shrinking|tailing off|anaemic}",
            "{nobody is trading it|the move has no volume behind it|the move lacks volume}",
        ),
        (
            "vol -<n>%",
            "vol drying",
            "lt vol",
            "light volume",
            "vol <n>% blw avg",
            "no volume",
            "vol fading",
            "thin vol",
            "volume <n>% below avg",
        ),
        (
            (
                "{volume|vol|turnover|rel_volume|volume_vs_avg}",
                "{-<n>%|<n>% below average|light|drying up|<n>% under avg|thin|fading}",
            ),
            (
                "{note|state|flag|remark}",
                "{volume drying up|low volume|light volume|volume fading}",
            ),
        ),
    ),
    "thesis_broken": Phrases(
        (
            "{the|our|my|the original|the whole} {thesis|idea|case|reason for the trade|premise} "
            "{is broken|no longer holds|is dead|is wrong|has failed|is invalid|does not hold|is gone|"
            "fell apart}",
            "{we were wrong|i was wrong|the reason for this trade is gone|why we are in this is over}"
            "{, thesis broken| on the thesis|}",
            "{the catalyst|the catalyst we waited for} {never came|was cancelled|failed}, {thesis "
            "broken|no thesis left|the idea is dead}",
        ),
        (
            "thesis broken",
            "thesis dead",
            "thesis gone",
            "wrong on this",
            "idea dead",
            "no thesis",
            "invalidated",
            "thesis busted",
            "story broken",
        ),
        (
            (
                "{thesis|thesis_state|idea|case}",
                "{broken|invalid|dead|no longer valid|false|failed}",
            ),
            ("{note|state|flag|remark}", "{thesis broken|thesis invalid|thesis dead|wrong thesis}"),
        ),
    ),
    "volatility": Phrases(
        (
            "{volatility|implied vol|realised volatility|IV|vol} {is|has risen|rose|is up|jumped|"
            "spiked|climbed} {by |}<n>{%| percent| pct}{ this week| since Monday|}",
            "{volatility|implied volatility|realised volatility|IV} {is {rising|spiking|exploding|"
            "picking up|expanding}|has doubled|keeps rising|blew out|is elevated}",
            "{swings|daily ranges|candles|intraday moves} are {getting wider|much larger than usual|"
            "wild|growing}",
        ),
        (
            "IV +<n>%",
            "vol up <n>%",
            "iv spike",
            "vol rising",
            "IV blowing out",
            "wild swings",
            "vol exp <n>%",
            "volatile",
            "ranges widening",
            "iv up <n>%",
        ),
        (
            (
                "{volatility|iv|iv_change|implied_vol|hv_change}",
                "{+<n>%|up <n>%|rising|spiking|high}",
            ),
            (
                "{note|state|flag|regime|remark}",
                "{volatility rising|vol spike|IV up <n>%|volatile}",
            ),
        ),
    ),
    "quiet": Phrases(
        (
            "{nothing|nothing much|nothing special|not much|little} {is going on|to report|is "
            "happening|has changed|new|to add}",
            f"{_NAME} is {{quiet|dull|flat on the day|in a tight range|calm|going sideways|drifting}}",
            "{no news|no catalyst}, {quiet tape|calm market|tight range|no change}",
            "{quiet|calm|dull|uneventful} {session|day|tape|trading|market}",
        ),
        (
            "quiet",
            "nothing new",
            "flat day",
            "no news",
            "calm",
            "rangebound",
            "tight range",
            "nada",
            "no chg",
            "sideways",
            "unch",
            "dull tape",
        ),
        (
            (
                "{note|state|news|flag|remark|regime}",
                "{quiet|none|no news|nothing new|calm|range|flat|sideways|unchanged|-}",
            ),
        ),
    ),
    "gap": Phrases(
        (
            f"{_NAME} {{gapped|opened|gapped open}} {{up |down |higher |lower |}}{{<n>%|<n> percent|by "
            "<n>%|<n> pct} {overnight|at the open|this morning|on the open|from yesterday's close}",
            "{a|an|there was a|big} {overnight |opening |morning |}gap {of <n>%|of <n> percent|}",
            "{it|price} {gapped|left a gap} {overnight|at the open|this morning}",
        ),
        (
            "gap <n>%",
            "gapped <n>%",
            "gap open",
            "o/n gap <n>%",
            "gapped o/n",
            "opening gap",
            "gap up <n>%",
            "gap dn <n>%",
            "GAP <n>%",
        ),
        (
            ("{gap|gap_pct|overnight_gap|open_gap|gap_open}", "{<n>%|<n>|+<n>%|-<n>%|<n> pct}"),
            ("{note|event|flag|remark}", "{gap open|gapped <n>%|overnight gap|gap of <n>%}"),
        ),
    ),
    "illiquid": Phrases(
        (
            "{the |}{spread|bid-ask spread|bid/ask} {is|widened to|blew out to|stands at|of} <n> "
            "{bp|bps|basis points}",
            "{liquidity|the book|depth|the order book} {is {poor|gone|very thin|terrible|drying up|"
            "bad}|has vanished|dried up|evaporated|is not there}",
            "{hard to get filled|fills are awful|slippage is terrible}, {no liquidity|liquidity is "
            "poor|illiquid}",
        ),
        (
            "spread <n>bp",
            "sprd <n>bps",
            "illiquid",
            "no liq",
            "thin book",
            "wide mkt <n>bp",
            "liq gone",
            "spread <n>bps wide",
            "no bids",
            "poor liquidity",
        ),
        (
            ("{spread|spread_bp|bid_ask|sprd|spread_bps}", "{<n>bp|<n> bps|<n>}"),
            ("{liquidity|depth|book}", "{poor|thin|gone|bad|low|dried up}"),
        ),
    ),
    "winner": Phrases(
        (
            "{the position|the trade|it|open P&L|we|this} {is|sits|stands|are} {up|ahead|in profit by|"
            "at a gain of|winning} <n>{%| percent| pct}{ already| since entry|}",
            "{a|sitting on a|showing a|with a} {gain|profit|unrealised gain} of <n>{%| percent| pct}",
            "{the trade|the position|it} {is {well in profit|deep in the money|a big winner|well "
            "ahead}|has worked very well|made good money}",
        ),
        (
            "+<n>%",
            "up <n>%",
            "pnl +<n>%",
            "in profit <n>%",
            "big winner",
            "in the green <n>%",
            "nice winner",
            "+<n>% open",
            "deep in profit",
            "P&L +<n>%",
            "upl +<n>%",
        ),
        (
            (
                "{pnl|pnl_pct|open_pnl|upl|gain|unrealized|unrealised_pct|return}",
                "{+<n>%|<n>%|+<n>|+<n> pct}",
            ),
            ("{note|state|flag|remark}", "{well in profit|winner|in profit|up <n>%|gain <n>%}"),
        ),
    ),
    "loser": Phrases(
        (
            "{the position|the trade|it|open P&L|we|this} {is|sits|stands|are} {underwater by|in the "
            "red by|at a loss of|losing|behind by} <n>{%| percent| pct}{ already| since entry|}",
            "{a|sitting on a|showing a|with a} {loss|drawdown|unrealised loss} of <n>{%| percent}",
            "{the trade|the position|it} {is {underwater|in the red|a loser|under water|at a "
            "loss}|has gone against us|hurts|keeps losing money}",
        ),
        (
            "pnl -<n>%",
            "loss <n>%",
            "underwater <n>%",
            "in the red",
            "loser",
            "-<n>% open",
            "red <n>%",
            "u/w <n>%",
            "dd <n>%",
            "bleeding",
            "P&L -<n>%",
            "upl -<n>%",
        ),
        (
            (
                "{pnl|pnl_pct|open_pnl|upl|unrealized|unrealised_pct|return}",
                "{-<n>%|-<n>|-<n> pct}",
            ),
            ("{note|state|flag|remark}", "{underwater|loser|in the red|loss <n>%|drawdown <n>%}"),
            ("{drawdown|dd|loss}", "{<n>%|<n>}"),
        ),
    ),
    "stale": Phrases(
        (
            "{held|we have held it|in the book|open|on the sheet} for <n> {days|sessions} "
            "{without progress|and no progress|going nowhere|with nothing to show|and still flat}",
            "{the trade|the position|it} {has gone|went|is going} nowhere {in <n> days|for <n> "
            "sessions|since entry|for weeks|}",
            "{dead money|time stop reached|the time stop is due|stale position|stale trade}",
        ),
        (
            "<n>d no progress",
            "dead money",
            "stale",
            "held <n>d nowhere",
            "time stop",
            "going nowhere",
            "<n> days flat",
            "day <n> no move",
            "stale <n>d",
        ),
        (
            ("{days_held|held|age|holding_days}", "{<n>, stale|<n>d no progress|<n> days nowhere}"),
            ("{note|state|flag|remark}", "{stale|dead money|time stop|going nowhere|stale <n>d}"),
        ),
    ),
}

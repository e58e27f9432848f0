"""The first writer's layouts in words: prose, chat, shorthand, bullets, news."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from training.demo_models import lexicon
from training.demo_models.positions import BARE_SENTENCES, SENTENCES, SIDE_AFTER, TAGS
from training.demo_models.records import fields, table
from training.demo_models.scene import Scene

_TICK: Final = chr(0xE000)


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def position_sentences(scene: Scene) -> list[str]:
    """One or two sentences that name the instrument and, where known, the side."""
    rng, side = scene.rng, scene.side
    if side is None:
        return [scene.one_of(BARE_SENTENCES)]
    if rng.random() < 0.72:
        return [scene.position(SENTENCES[side])]
    return [scene.one_of(BARE_SENTENCES), scene.position(SIDE_AFTER[side])]


def sentences(scene: Scene, most_noise: int = 3) -> list[str]:
    """The scene as sentences without full stops, in random order."""
    rng = scene.rng
    parts = position_sentences(scene)
    extra = [scene.situation_sentence()]
    if rng.random() < 0.4:
        extra.append(scene.atr_sentence())
    if rng.random() < 0.3:
        extra.append(scene.stop_sentence())
    extra += [scene.noise() for _ in range(rng.randrange(most_noise + 1))]
    rng.shuffle(extra)
    cut = rng.randrange(len(extra) + 1) if rng.random() < 0.5 else 0
    return extra[:cut] + parts + extra[cut:]


def prose(scene: Scene) -> str:
    rng = scene.rng
    end = rng.choices(
        (". ", "; ", ", ", ".\n", "\n", " - ", " and ", "... "), (9, 2, 3, 1, 1, 1, 1, 1)
    )[0]
    parts = sentences(scene)
    if end.startswith("."):
        parts = [_capitalised(part) for part in parts]
    return end.join(parts) + rng.choice((".", ".", "", "?"))


def shorthand(scene: Scene) -> str:
    """`lng ABC 500 @ 12.30, rsi 78, stop 11.9`."""
    rng = scene.rng
    tick = rng.choice((_TICK, _TICK, _TICK, "$" + _TICK, _TICK + ":", "#" + _TICK))
    parts = [tick]
    if scene.side is not None:
        tag = scene.position((TAGS[scene.side],))
        if rng.random() < 0.6:
            joiner = rng.choice((" ", " ", " ", "/", ":", " - ", ", ", " | ", "="))
            parts = [f"{tag}{joiner}{tick}" if rng.random() < 0.5 else f"{tick}{joiner}{tag}"]
            if rng.random() < 0.5:
                parts[0] += scene.say(
                    "{ @<entry>| @ <entry>| fr <entry>| <entry>| from <entry>| <qty>}"
                )
        else:
            parts.append(tag)
    extra = [scene.situation_shorthand()]
    if rng.random() < 0.35:
        extra.append(scene.atr_sentence())
    for _ in range(rng.randrange(4)):
        extra.append(
            scene.say(
                "{px <price>|last <price>|stp <small>%|tgt <small>%|?|pls adv|thx|adj?|<time>|sz <qty>|"
                "avg <entry>|rsi <neutral_rsi>|<index> flat|vwap <price>|<acronym> ok|hold?|<acronym>|"
                "1R=<d>%|vs <peer>|ema <price>|<name>|mgmt?|what do|acct <acc>|2nd day|eod|mkt <price>}"
            )
            if rng.random() < 0.8
            else scene.stop_sentence()
        )
    rng.shuffle(extra)
    at = rng.randrange(len(extra) + 1) if rng.random() < 0.3 else 0
    parts = extra[:at] + parts + extra[at:]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    joiner = rng.choice((" ", " ", ", ", ", ", " / ", " | ", "; ", " - ", ". ", " // ", "\n", ","))
    return joiner.join(parts)


def bullets(scene: Scene) -> str:
    rng = scene.rng
    mark = rng.choice(("- ", "* ", "+ ", "• ", "> ", "-- ", "~ ", "\t", "[ ] ", ""))
    parts = sentences(scene)
    if rng.random() < 0.25:
        sep = rng.choice((". ", ") ", ": "))
        lines = [f"{i}{sep}{part}" for i, part in enumerate(parts, 1)]
    else:
        lines = [mark + part for part in parts]
    head = scene.say(
        "{|Review|Morning note|Trade review|Desk notes|Status|Handover|Notes <time>|Risk meeting, "
        "<name>|<name>'s notes|Position review <acc>|What we know|Book check|TODO}"
    )
    return (f"{head}{rng.choice(('', ':', ' -'))}\n" if head else "") + "\n".join(lines)


def chat(scene: Scene) -> str:
    """A conversation of colleagues, a mail, or a question with a salutation."""
    rng = scene.rng
    parts = sentences(scene, 2)
    if rng.random() < 0.5:
        who = [
            scene.say("{<name>|<acronym>|trader|pm|risk|desk|user<d>|<name> <name>}") for _ in "ab"
        ]
        form = rng.choice(("{}: {}", "<{}> {}", "[{}] {}", "{} - {}", "{} {{t}}: {}", "{}> {}"))
        lines = []
        for i, part in enumerate(parts):
            lines.append(form.format(who[i % 2], part).replace("{t}", scene.say("<time>")))
        return "\n".join(lines)
    start = scene.say(
        "{{hi|hello|hey|morning|dear|good morning|}{ <name>| team| all| desk|},{ |\n}|Subject: <t>\n\n|"
        "{quick question|fyi|heads up|question|note to self|reminder}: |{To|From}: <name>\nRe: "
        "{<t>|position <t>|levels}\n\n|@<name> }"
    )
    end = scene.say(
        "{|\n<name>|\nthanks, <name>|\nbest\n<name>| thx| cheers|\n-- \n<name>, <acronym>}"
    )
    return start + ". ".join(parts) + end


def news(scene: Scene) -> str:
    """A news story about the instrument, and the desk's position."""
    rng = scene.rng
    firm = lexicon.company(rng)
    venue = rng.choice(lexicon.EXCHANGES)
    tag = rng.choice(
        (f"({venue}: {_TICK})", f"({venue}:{_TICK})", f"({_TICK})", f"[{_TICK}]", f", {_TICK},")
    )
    named = rng.random() < 0.75
    subject = f"{firm} {tag}" if named else _TICK
    lead = scene.situation_sentence()
    opening = scene.say(
        "{<when>|this week|<time>|today|late <when>|in early trading}"
        + rng.choice((", ", " - ", ": "))
    )
    body = [lexicon.filler(rng) for _ in range(rng.randrange(4))]
    if rng.random() < 0.25:
        peer = f"{lexicon.company(rng)} ({venue}: {scene.other_ticker()})"
        verb = scene.say("{rose|fell|added|lost|was up|was down|reported|traded flat}")
        body.append(f"Rival {peer} {verb} {scene.say('<small>%')}.")
    if rng.random() < 0.5:
        body.append(_capitalised(scene.noise()) + ".")
    if rng.random() < 0.35:
        body.append(_capitalised(scene.atr_sentence()) + ".")
    rng.shuffle(body)
    story = [
        f"{subject} {scene.say('{said|reported|was in focus|traded actively|drew attention}')} "
        f"{opening}{lead}.",
        *body,
    ]
    if rng.random() < 0.4:
        story.insert(0, f"{lexicon.city(rng).upper()}, {scene.say('<time>')} -")
    desk = _desk(scene, firm if named else None)
    story.insert(rng.choice((len(story), len(story), 0)), desk)
    headline = scene.say("{|||<time> |BREAKING: |*|NEWS: |WIRE - |}")
    return headline + rng.choice((" ", " ", "\n")).join(story)


def _desk(scene: Scene, firm: str | None) -> str:
    """A sentence about the position; it names the company or the ticker."""
    rng, side = scene.rng, scene.side
    if side is None:
        return scene.say(
            "{Any change?|Please review.|What do we do?|We follow <t>.|Levels for <t>?}"
        )
    if rng.random() < 0.5:
        text = scene.one_of(SENTENCES[side])
        if firm and rng.random() < 0.4:
            text = text.replace(_TICK, firm)
    else:
        text = scene.one_of(SIDE_AFTER[side])
    scene.positions.append(text)
    return _capitalised(text) + "."


Layout = Callable[[Scene], str]

LAYOUTS: Final[tuple[tuple[Layout, float], ...]] = (
    (prose, 0.24),
    (shorthand, 0.2),
    (fields, 0.21),
    (table, 0.12),
    (news, 0.11),
    (bullets, 0.06),
    (chat, 0.06),
)
"""Each layout with its share of the prompts."""

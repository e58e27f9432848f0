"""A scene: the facts of one prompt of the first writer, and the values of its templates' slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Final

from training.demo_models import lexicon
from training.demo_models.phrases import PHRASES
from training.demo_models.positions import ATR, MISLEADING, NOISE, STOPS
from training.demo_models.situations import SITUATIONS, Side
from training.demo_models.templates import expand
from training.demo_models.tickers import (
    ACRONYMS,
    INDEXES,
    Split,
    random_ticker,
    root_code,
    split_of,
)

_PRIVATE: Final = 0xE000
"""First of the private-use characters that stand for codes until `finish`, so that changes of case
and typing errors do not affect them."""


@dataclass(slots=True)
class Scene:
    """The facts that a prompt states.

    Attributes:
        ticker: the instrument.
        side: of the position; None if the prompt states none.
        situation: key of `SITUATIONS`.
        price: the last price.
        number: the situation's number, once a phrase has stated it.
        atr: average true range in percent, once a phrase has stated it.
        codes: texts of the private-use characters, in order.
        phrases: written phrases about the situation.
        positions: written phrases that state the side.
    """

    rng: Random
    split: Split
    ticker: str
    side: Side | None
    situation: str
    price: float
    number: str | None = None
    atr: str | None = None
    codes: list[str] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, rng: Random, split: Split) -> Scene:
        """A random scene; about one in six has no side."""
        side: Side | None = rng.choice(("LONG", "SHORT"))
        if rng.random() < 0.18:
            side = None
        price = round(10 ** rng.uniform(0.4, 3.2), 2)
        ticker = random_ticker(rng, split)
        return cls(rng, split, ticker, side, rng.choice(tuple(SITUATIONS)), price, codes=[ticker])

    def say(self, template: str) -> str:
        """Expands `template`, with the scene's values in its slots."""
        return expand(template, self.rng, self._slot)

    def one_of(self, templates: tuple[str, ...]) -> str:
        return self.say(self.rng.choice(templates))

    def situation_sentence(self) -> str:
        return self._note_phrase(self.one_of(PHRASES[self.situation].sentences))

    def situation_shorthand(self) -> str:
        return self._note_phrase(self.one_of(PHRASES[self.situation].shorthand))

    def situation_field(self) -> tuple[str, str]:
        key, value = self.rng.choice(PHRASES[self.situation].fields)
        key, value = self._note_phrase(self.say(key)), self._note_phrase(self.say(value))
        return key, value

    def _note_phrase(self, phrase: str) -> str:
        self.phrases.append(phrase)
        return phrase

    def position(self, templates: tuple[str, ...]) -> str:
        """Expands one of the templates, which state the side."""
        self.positions.append(self.one_of(templates))
        return self.positions[-1]

    def atr_sentence(self) -> str:
        return self.say(ATR)

    def stop_sentence(self) -> str:
        """Where stop and target are; noise if the side is unknown, as it decides their order."""
        return self.say(STOPS[self.side]) if self.side else self.noise()

    def noise(self) -> str:
        """An irrelevant remark, sometimes with words that state a side elsewhere."""
        if self.rng.random() < 0.15:
            return self.one_of(MISLEADING)
        return self.one_of(NOISE)

    def code(self, text: str) -> str:
        """A character that stands for the code `text` until `finish` replaces it."""
        self.codes.append(text)
        return chr(_PRIVATE + len(self.codes) - 1)

    def other_ticker(self) -> str:
        return self.code(random_ticker(self.rng, self.split))

    def acronym(self) -> str:
        """A usual or sometimes an invented acronym; an invented one is of the scene's split."""
        if self.rng.random() < 0.85:
            return self.code(self.rng.choice(ACRONYMS))
        invented = root_code(self.rng)
        return self.code(invented) if split_of(invented) == self.split else self.acronym()

    def near(self, spread: float) -> str:
        """A price within the fraction `spread` of the scene's."""
        digits = 2 if self.price < 1000 else self.rng.choice((0, 1, 2))
        return f"{self.price * (1 + self.rng.uniform(-spread, spread)):.{digits}f}"

    def finish(self, text: str) -> str:
        """Replaces the private-use characters in `text` by their codes."""
        return text.translate({_PRIVATE + i: code for i, code in enumerate(self.codes)})

    def _slot(self, name: str) -> str:
        filled: str = getattr(self, f"_slot_{name}")()
        return filled

    def _slot_t(self) -> str:
        return chr(_PRIVATE)

    def _slot_n(self) -> str:
        if self.number is None:
            low, high, decimals = SITUATIONS[self.situation].number
            if decimals and self.rng.random() < 0.25 and low >= 2:
                decimals = 0
            self.number = f"{self.rng.uniform(low, high):.{decimals}f}"
        return self.number

    def _slot_atr(self) -> str:
        if self.atr is None:
            self.atr = f"{self.rng.choice((0.5, 1.5, 3.0)) + self.rng.uniform(0, 1.45):.1f}"
        return self.atr

    def _slot_qty(self) -> str:
        rng = self.rng
        number = rng.choice((rng.randrange(1, 99), rng.randrange(1, 60) * 100, rng.randrange(9999)))
        text = f"{number:,}" if rng.random() < 0.3 else str(number)
        return rng.choice((text, text, text, f"{rng.randrange(1, 90)}k"))

    def _slot_price(self) -> str:
        return self.near(0.01)

    def _slot_entry(self) -> str:
        return self.near(0.08)

    def _slot_stop_below(self) -> str:
        return f"{self.price * (1 - self.rng.uniform(0.01, 0.08)):.2f}"

    def _slot_stop_above(self) -> str:
        return f"{self.price * (1 + self.rng.uniform(0.01, 0.08)):.2f}"

    def _slot_small(self) -> str:
        return f"{self.rng.uniform(0.1, 30):.1f}"

    def _slot_neutral_rsi(self) -> str:
        return f"{self.rng.uniform(40, 60):.{self.rng.randrange(2)}f}"

    def _slot_d(self) -> str:
        return str(self.rng.randrange(1, 10))

    def _slot_acc(self) -> str:
        rng = self.rng
        digits = str(rng.randrange(10, 99999))
        return rng.choice((digits, "#" + digits, self.acronym() + rng.choice("-_/") + digits))

    def _slot_name(self) -> str:
        return lexicon.name(self.rng)

    def _slot_when(self) -> str:
        return self.rng.choice(
            ("Monday", "last week", "March", "the open", "yesterday", "Q2", "May")
        )

    def _slot_time(self) -> str:
        rng = self.rng
        clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        return rng.choice((clock, clock + f":{rng.randrange(60):02d}", clock + " ET", clock + "Z"))

    def _slot_peer(self) -> str:
        return self.other_ticker()

    def _slot_index(self) -> str:
        return self.code(self.rng.choice(INDEXES))

    def _slot_acronym(self) -> str:
        return self.acronym()

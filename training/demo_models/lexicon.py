"""Words of the synthetic market: people, cities, companies, filler sentences and invented words."""

from __future__ import annotations

from random import Random
from typing import Final

_SYLLABLES: Final = (
    "al an ar as at be bel ber bor bra bri bul cal can cap car cen cha cle col con cor cra cre "
    "cul da del den der din dor dra dre du el en er es fa fen fer fil fin fla flo for fra fre fu "
    "gal gar gen gil gla glo gor gra gre gri ha hal har hel her hil hol hor hu il im in ir is ja "
    "jo ka kel ken ker kin kor la lan lar le len li lin lo lor lu lum ma mal man mar mel men mer "
    "mi min mo mon mor mu na nal nel ner ni nor nu ol on or os pa pal pan par pel pen per phi pin "
    "pla plo por pra pre pri pro qua que qui ra ran re rel ren ri rin ro ron ru sa sal san scar "
    "sel sen ser shi sil sin sko sla so sol son spa spe sta ste sto stra su sul ta tal tan tar te "
    "tel ten ter tha the ti til tin to tor tra tre tri tu ul um un ur va val van var ve vel ven "
    "ver vi vil vin vo vol vor wa wal war wel wen wes wil win wor xan yar yel za zel zen zo zor "
    "ly ing ed tion ous ment ness able ish ward est ck sh th ng ss ble dge ght nch"
).split()

_COMPANY_WORDS: Final = (
    "Northern Summit Apex Harbor Cedar Granite Silver Golden United General First National Global "
    "Pacific Atlantic Nordic Alpine Delta Orion Vertex Quantum Solar Blue Red Green Iron Copper "
    "River Lake Stone Bridge Crown Royal Liberty Pioneer Frontier Horizon Beacon Sterling Falcon "
    "Eagle Lion Tiger Phoenix Atlas Titan Nova Zenith Polar Coastal Valley Prairie Highland Metro "
    "Advanced Applied Integrated Digital Micro Bio Medi Agri Aero Auto Electro Thermo Hydro Data "
    "Cloud Cyber Smart Rapid Prime Core Edge Peak True Bright Clear Open Next New Old Great"
).split()
_COMPANY_KINDS: Final = (
    "Technologies Systems Software Semiconductor Semiconductors Pharma Pharmaceuticals "
    "Biosciences Therapeutics Energy Oil Gas Petroleum Power Utilities Water Steel Mining Metals "
    "Lithium Motors Automotive Airlines Aerospace Shipping Logistics Freight Rail Bank Bancorp "
    "Financial Capital Insurance Assurance Trust Realty Properties Hotels Resorts Casinos Retail "
    "Stores Brands Foods Beverages Brewing Farms Chemicals Materials Plastics Paper Packaging "
    "Media Studios Networks Telecom Wireless Communications Robotics Devices Instruments Labs "
    "Health Medical Education Travel Entertainment Games Apparel Footwear Homes Building Cement "
    "Glass"
).split()
_COMPANY_ENDS: Final = (
    "Inc. Inc Corp. Corp Ltd. Ltd plc PLC AG SA SE NV SpA AB ASA Oyj Group Holdings Partners Co. "
    "Company LP Trust Limited"
).split()
_NOUNS: Final = (
    "analyst trader broker regulator factory board union customer supplier investor manager plant "
    "court minister bank fund rival partner committee engineer ship port truck mine store chain "
    "warehouse contract order product chip drug trial loan bond rate tariff budget price cost "
    "margin forecast demand supply inventory backlog pipeline division unit subsidiary office "
    "region market sector index currency dollar yen crude gold copper wheat gas harvest storm "
    "strike vote election summit meeting report survey letter memo call webcast filing audit "
    "dividend buyback spinoff merger offer licence patent lawsuit settlement probe fine recall"
).split()
_ADJECTIVES: Final = (
    "large small new old local foreign early late quiet busy strong weak steady mixed cautious "
    "upbeat cheap dear thin deep broad narrow public private regional seasonal annual quarterly "
    "preliminary final official unnamed senior junior independent domestic overseas industrial"
).split()
_VERBS: Final = (
    "said expects reported reviewed delayed approved signed cut raised opened closed moved "
    "watched joined left met missed tested checked planned discussed repeated confirmed denied "
    "postponed completed started finished extended renewed named hired visited warned noted added "
    "dropped"
).split()
_CITIES: Final = (
    "London Tokyo Frankfurt Zurich Paris Milan Madrid Oslo Dallas Houston Denver Seattle Boston "
    "Chicago Toronto Sydney Mumbai Seoul Taipei Singapore Shanghai Dublin Austin Geneva Detroit"
).split()
_NAMES: Final = (
    "Anna Ben Carla Dan Elena Frank Grace Hiro Ivan Julia Ken Laura Mike Nina Omar Paul Rita Sam "
    "Tom Uma Vera Will Xi Yuki Zoe Maria Jack Priya Lars Chen Ortiz Smith Novak Kowalski Meyer "
    "Dubois Rossi Tanaka Singh Brown Lee Garcia Olsen Fischer Adams Clark Evans Hughes Patel"
).split()
EXCHANGES: Final = (
    "NYSE NASDAQ Nasdaq NasdaqGS NYSEARCA AMEX LSE TSX TSXV ASX XETRA ETR EPA FRA AMS BIT SWX STO "
    "OSE HKEX HKG TSE NSE BSE KRX SGX OTC OTCQX CME CBOT NYMEX COMEX ICE EUREX BATS"
).split()


def nonce(rng: Random) -> str:
    """An invented lower-case word."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3, 3))))


def name(rng: Random) -> str:
    return rng.choice(_NAMES) if rng.random() < 0.8 else nonce(rng).capitalize()


def city(rng: Random) -> str:
    return rng.choice(_CITIES)


def company(rng: Random) -> str:
    """A company's name, in one of the usual shapes."""
    kind = rng.random()
    first = rng.choice(_COMPANY_WORDS) if kind < 0.45 else nonce(rng).capitalize()
    parts = [first]
    if rng.random() < 0.75:
        parts.append(rng.choice(_COMPANY_KINDS))
    if rng.random() < 0.5 or len(parts) == 1:
        parts.append(rng.choice(_COMPANY_ENDS))
    return " ".join(parts)


def _noun(rng: Random) -> str:
    return nonce(rng) if rng.random() < 0.15 else rng.choice(_NOUNS)


def filler(rng: Random) -> str:
    """An irrelevant sentence, with some invented words."""
    subject = f"{rng.choice(('The', 'A', 'One', 'Its', 'That', 'Another'))} "
    if rng.random() < 0.5:
        subject += rng.choice(_ADJECTIVES) + " "
    subject += _noun(rng)
    verb = nonce(rng) + "ed" if rng.random() < 0.1 else rng.choice(_VERBS)
    rest = f"{rng.choice(('the', 'a', 'its', 'some', 'that'))} {_noun(rng)}"
    tail = rng.choice(
        (
            "",
            "",
            f" in {city(rng)}",
            f" with {name(rng)}",
            f" after the {_noun(rng)} of the {_noun(rng)}",
            f" {rng.randrange(2, 40)} {_noun(rng)}s ago",
            f" for {rng.randrange(1, 900) / 10} {rng.choice(('million', 'billion', 'pct', '%'))}",
        )
    )
    return f"{subject} {verb} {rest}{tail}."

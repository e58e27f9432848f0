"""WAV files in memory, byte by byte and sample by sample."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from llm_sidecar.tts import wav
from llm_sidecar.tts.voice import Wav

MONO = struct.pack("<HHIIHH", 1, 1, 8000, 16_000, 2, 16)
"""The format of 16-bit PCM, one channel, 8,000 samples a second."""


def chunk(name: bytes, content: bytes, *, size: int | None = None) -> bytes:
    padding = b"\0" * (len(content) % 2)
    return name + struct.pack("<I", len(content) if size is None else size) + content + padding


def riff(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def layout(kind: int, bits: int, *, channels: int = 1, rate: int = 8000) -> bytes:
    block = channels * bits // 8
    return struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits)


def extensible(kind: int, bits: int) -> bytes:
    return layout(0xFFFE, bits) + struct.pack("<HHIH", 22, bits, 0, kind) + b"\0" * 14


def pcm(*samples: int) -> bytes:
    return np.array(samples, "<i2").tobytes()


def samples(file: bytes) -> list[int]:
    found: list[int] = wav.decode(file).samples.tolist()
    return found


# Writing


def test_a_wav_is_16_bit_pcm_of_one_channel() -> None:
    file = wav.encode(Wav(np.array([0, 1, -1, 32_767, -32_768], np.int16), 22_050))
    data = pcm(0, 1, -1, 32_767, -32_768)
    assert file == riff(chunk(b"fmt ", layout(1, 16, rate=22_050)), chunk(b"data", data))


def test_a_wav_is_read_as_it_was_written() -> None:
    spoken = Wav(np.arange(-300, 300, dtype=np.int16), 16_000)
    read = wav.decode(wav.encode(spoken))
    assert read.sample_rate == 16_000
    assert read.samples.dtype == np.int16
    assert read.samples.tolist() == spoken.samples.tolist()


# Reading


@pytest.mark.parametrize(
    ("kind", "bits", "data", "read"),
    [
        (1, 8, bytes([128, 192, 64, 0, 255]), [0, 2**14, -(2**14), -(2**15), 32_512]),
        (1, 16, pcm(0, 2**14, -(2**14), -(2**15), 3), [0, 2**14, -(2**14), -(2**15), 3]),
        (1, 24, b"\0\0\0\0\0\x40\0\0\xc0\0\0\x80\0\x03\0", [0, 2**14, -(2**14), -(2**15), 3]),
        (1, 24, b"\x80\x00\x40", [2**14]),
        (
            1,
            32,
            np.array([0, 2**30, -(2**30), -(2**31), 3 << 16], "<i4").tobytes(),
            [0, 2**14, -(2**14), -(2**15), 3],
        ),
        (
            3,
            32,
            np.array([0, 0.5, -0.5, -1, 1], "<f4").tobytes(),
            [0, 2**14, -(2**14), -(2**15), 32_767],
        ),
        (
            3,
            64,
            np.array([0, 0.5, -0.5, -2, 2], "<f8").tobytes(),
            [0, 2**14, -(2**14), -(2**15), 32_767],
        ),
    ],
)
def test_every_usual_format_gives_the_same_samples(
    kind: int, bits: int, data: bytes, read: list[int]
) -> None:
    for form in (layout(kind, bits), extensible(kind, bits)):
        assert samples(riff(chunk(b"fmt ", form), chunk(b"data", data))) == read


def test_the_rate_is_the_formats() -> None:
    file = riff(chunk(b"fmt ", layout(1, 16, rate=44_100)), chunk(b"data", pcm(1)))
    assert wav.decode(file).sample_rate == 44_100


def test_channels_are_mixed() -> None:
    stereo = riff(chunk(b"fmt ", layout(1, 16, channels=2)), chunk(b"data", pcm(100, 300, -1, -3)))
    assert samples(stereo) == [200, -2]


def test_other_chunks_are_passed_over_with_their_padding() -> None:
    file = riff(
        chunk(b"LIST", b"abc"),
        chunk(b"fmt ", MONO),
        chunk(b"id3 ", b"x"),
        chunk(b"data", pcm(7, 8)),
    )
    assert samples(file) == [7, 8]


def test_of_chunks_with_the_same_name_the_first_counts() -> None:
    file = riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(1)), chunk(b"data", pcm(2)))
    assert samples(file) == [1]


def test_a_last_chunk_that_is_shorter_than_it_says_is_read_as_far_as_it_goes() -> None:
    cut = riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(1, 2) + b"\3", size=1 << 31))
    assert samples(cut[:-1]) == [1, 2]
    assert samples(riff(chunk(b"fmt ", MONO), b"data" + struct.pack("<I", 0))) == []


@pytest.mark.parametrize("trailing", [b"LIST", b"LIST\1\0\0"])
def test_a_chunk_whose_head_is_cut_off_is_none(trailing: bytes) -> None:
    assert samples(riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(1)), trailing)) == [1]


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin as a WAV does"),
    "no RIFF": (b"RIFX" + riff(chunk(b"fmt ", MONO))[4:], "does not begin as a WAV does"),
    "no WAVE": (b"RIFF\0\0\0\0AVI " + chunk(b"fmt ", MONO), "does not begin as a WAV does"),
    "no chunks": (riff(), "has no format or no data"),
    "no data": (riff(chunk(b"fmt ", MONO)), "has no format or no data"),
    "no format": (riff(chunk(b"data", pcm(1))), "has no format or no data"),
    "half a format": (
        riff(chunk(b"fmt ", MONO[:15]), chunk(b"data", pcm(1))),
        "has a format that is cut off",
    ),
    "no channels": (
        riff(chunk(b"fmt ", layout(1, 16, channels=0)), chunk(b"data", pcm(1))),
        "has a format that contradicts itself",
    ),
    "no rate": (
        riff(chunk(b"fmt ", layout(1, 16, rate=0)), chunk(b"data", pcm(1))),
        "has a format that contradicts itself",
    ),
    "another block": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 8000, 1, 4, 16)), chunk(b"data", pcm(1))),
        "has a format that contradicts itself",
    ),
    "mu-law": (
        riff(chunk(b"fmt ", layout(7, 8)), chunk(b"data", b"12")),
        "has 8-bit samples of format 7; send 16-bit PCM",
    ),
    "extensible without its kind": (
        riff(chunk(b"fmt ", extensible(1, 16)[:25]), chunk(b"data", pcm(1))),
        "has 16-bit samples of format 65534; send 16-bit PCM",
    ),
    "extensible of a kind beyond 32767": (
        riff(chunk(b"fmt ", extensible(65_533, 16)), chunk(b"data", pcm(1))),
        "has 16-bit samples of format 65533; send 16-bit PCM",
    ),
    "12 bits": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 2, 8000, 1, 3, 12)), chunk(b"data", b"123")),
        "has 12-bit samples of format 1; send 16-bit PCM",
    ),
    "16-bit floats": (
        riff(chunk(b"fmt ", layout(3, 16)), chunk(b"data", pcm(1))),
        "has 16-bit samples of format 3; send 16-bit PCM",
    ),
    "not a number": (
        riff(chunk(b"fmt ", layout(3, 32)), chunk(b"data", np.array([0, np.nan], "<f4").tobytes())),
        "holds samples that are no numbers",
    ),
    "infinite": (
        riff(chunk(b"fmt ", layout(3, 64)), chunk(b"data", np.array([np.inf, 0], "<f8").tobytes())),
        "holds samples that are no numbers",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_wav_is_refused_with_the_reason(kind: str) -> None:
    file, reason = BAD[kind]
    with pytest.raises(ValueError, match=f"^{reason}$"):
        wav.decode(file)


def test_an_extensible_format_of_26_bytes_says_its_kind() -> None:
    form = extensible(1, 16)[:26]
    assert samples(riff(chunk(b"fmt ", form), chunk(b"data", pcm(5)))) == [5]


# Joining


def signal(*values: int, rate: int = 1000) -> Wav:
    return Wav(np.array(values, np.int16), rate)


def values(made: Wav) -> list[int]:
    found: list[int] = made.samples.tolist()
    return found


def test_silence_around_speech_is_cut_to_fifteen_milliseconds() -> None:
    # At 1,000 samples a second a margin is 15 samples.
    trimmed = wav.trim(signal(*[40] * 30, 41, 0, -41, *[-40] * 30))
    assert values(trimmed) == [*[40] * 15, 41, 0, -41, *[-40] * 15]
    assert trimmed.sample_rate == 1000


def test_a_margin_is_no_longer_than_the_silence_there_is() -> None:
    assert values(wav.trim(signal(0, 500, 0))) == [0, 500, 0]


def test_the_loudest_sample_of_all_counts_as_loud() -> None:
    assert values(wav.trim(signal(-32_768))) == [-32_768]


@pytest.mark.parametrize("quiet", [[], [0] * 9, [40, -40]])
def test_silence_alone_is_nothing(quiet: list[int]) -> None:
    trimmed = wav.trim(signal(*quiet))
    assert values(trimmed) == []
    assert trimmed.sample_rate == 1000


def test_both_ends_fade_over_five_milliseconds_and_a_pause_follows() -> None:
    softened = wav.soften(signal(*[8000] * 12), pause=0.003)
    # Five samples rise from nothing to the whole, and five fall.
    assert values(softened) == [
        0,
        2000,
        4000,
        6000,
        8000,
        8000,
        8000,
        8000,
        6000,
        4000,
        2000,
        0,
        0,
        0,
        0,
    ]
    assert softened.samples.dtype == np.int16
    assert softened.sample_rate == 1000


def test_what_is_short_fades_over_its_half() -> None:
    assert values(wav.soften(signal(*[8000] * 5), pause=0.0)) == [0, 8000, 8000, 8000, 0]
    assert values(wav.soften(signal(), pause=0.002)) == [0, 0]


def test_softening_leaves_the_part_itself_as_it_is() -> None:
    part = signal(*[8000] * 12)
    wav.soften(part, pause=0.0)
    assert values(part) == [8000] * 12


def test_parts_are_joined_one_after_the_other() -> None:
    joined = wav.join([signal(1, 2), signal(3), signal(4, 5)])
    assert values(joined) == [1, 2, 3, 4, 5]
    assert joined.sample_rate == 1000
    assert values(wav.join([signal(6)])) == [6]


def test_a_fade_takes_five_milliseconds() -> None:
    fade: float = wav.FADE
    assert fade == 0.005

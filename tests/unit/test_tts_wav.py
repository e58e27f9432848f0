"""WAV files in memory, byte by byte and sample by sample."""

from __future__ import annotations

import contextlib
import random
import struct
import sys

import numpy as np
import pytest

from llm_sidecar.errors import VoiceUnavailable
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


def layout(kind: int, bits: int, *, channels: int = 1, rate: int = 8000, size: int = 0) -> bytes:
    """A format whose samples have this many bytes, or as many as their bits need."""
    block = channels * (size or -(-bits // 8))
    return struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits)


def extensible(kind: int, bits: int, *, valid: int | None = None) -> bytes:
    valid = bits if valid is None else valid
    return layout(0xFFFE, bits) + struct.pack("<HHIH", 22, valid, 0, kind) + GUID


GUID = bytes.fromhex("000000001000800000aa00389b71")
"""What follows the tag in the GUID of an extensible format."""


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
    for rate in (1, 44_100, 2**31 - 1):
        file = riff(chunk(b"fmt ", layout(1, 8, rate=rate)), chunk(b"data", b"12"))
        assert wav.decode(file).sample_rate == rate


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


UNKNOWN = 0xFFFFFFFF


@pytest.mark.parametrize("whole", [0, 4, 36, 1 << 31, UNKNOWN])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, UNKNOWN])
def test_what_was_written_to_a_pipe_is_read_to_its_end(whole: int, size: int) -> None:
    data = chunk(b"data", pcm(0, 1, -2, 3), size=size)
    file = riff(chunk(b"fmt ", MONO), chunk(b"LIST", b"INFO"), data)
    assert samples(file[:4] + struct.pack("<I", whole) + file[8:]) == [0, 1, -2, 3]


def test_a_data_chunk_of_size_0_is_read_to_the_end_where_only_the_file_has_its_size() -> None:
    assert samples(riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(0, 7), size=0))) == [0, 7]


def test_samples_that_look_like_a_chunk_are_samples_where_the_file_has_no_size() -> None:
    file = riff(chunk(b"fmt ", MONO), chunk(b"data", b"LIST", size=0))
    for whole in (0, 36, UNKNOWN):
        sized = file[:4] + struct.pack("<I", whole) + file[8:]
        assert samples(sized) == np.frombuffer(b"LIST", "<i2").tolist()


def test_a_data_chunk_of_size_0_that_another_follows_is_empty() -> None:
    assert samples(riff(chunk(b"fmt ", MONO), chunk(b"data", b""), chunk(b"LIST", b"INFO"))) == []


@pytest.mark.parametrize("name", [b"LIST", b"JUNK", b"id3 ", b"bext", b"~x !"])
def test_an_odd_chunk_may_lack_its_padding(name: bytes) -> None:
    odd = name + struct.pack("<I", 3) + b"abc"
    data = chunk(b"data", pcm(5, -6))
    assert samples(riff(odd, chunk(b"fmt ", MONO), odd, data)) == [5, -6]
    assert samples(riff(odd, b"\0", chunk(b"fmt ", MONO), odd, odd, b"\0", data)) == [5, -6]


def test_odd_data_may_lack_its_padding() -> None:
    form, data = chunk(b"fmt ", layout(1, 8)), b"data" + struct.pack("<I", 3) + b"\x80\xc0\x40"
    assert samples(riff(form, data, chunk(b"LIST", b"INFO"))) == [0, 2**14, -(2**14)]
    assert samples(riff(data, form)) == [0, 2**14, -(2**14)]


WHOLE = np.array([0, 2**30, -(2**30), -(2**31), 3 << 16], "<i4")
"""Samples of 32 bits, of which the lower 16 are zero."""
READ = [0, 2**14, -(2**14), -(2**15), 3]


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_up_to_16_bits_stand_at_the_top_of_two_bytes(bits: int) -> None:
    data = chunk(b"data", pcm(*READ))
    for form in (layout(1, bits), extensible(1, 16, valid=bits)):
        assert samples(riff(chunk(b"fmt ", form), data)) == READ


@pytest.mark.parametrize("bits", [17, 20, 24])
def test_up_to_24_bits_stand_at_the_top_of_three_bytes_or_four(bits: int) -> None:
    three = chunk(b"data", WHOLE.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())
    for form in (layout(1, bits), extensible(1, 24, valid=bits)):
        assert samples(riff(chunk(b"fmt ", form), three)) == READ
    four = chunk(b"data", WHOLE.tobytes())
    for form in (layout(1, bits, size=4), extensible(1, 32, valid=bits)):
        assert samples(riff(chunk(b"fmt ", form), four)) == READ


def test_floats_beyond_one_are_cut_off_however_large() -> None:
    data = np.array([1e308, 1e308, -1e308, -1e308, 1.5, -1, 0.5, 0.25], "<f8").tobytes()
    file = riff(chunk(b"fmt ", layout(3, 64, channels=2)), chunk(b"data", data))
    assert samples(file) == [32_767, -32_768, 0, 12_288]


def test_a_frame_that_is_cut_off_is_left_out() -> None:
    data = chunk(b"data", pcm(1, 3, 5), size=UNKNOWN)
    assert samples(riff(chunk(b"fmt ", layout(1, 16, channels=2)), data)) == [2]


def test_more_samples_than_are_converted_at_a_time_keep_their_order() -> None:
    # 150,000 frames of two channels are several blocks, and the last one is not full.
    left = np.arange(150_000, dtype=np.int64).astype("<i2")
    stereo = np.repeat(left, 2).tobytes()
    file = riff(chunk(b"fmt ", layout(1, 16, channels=2)), chunk(b"data", stereo))
    assert np.array_equal(wav.decode(file).samples, left)


def test_it_takes_1024_channels_and_no_more() -> None:
    data = chunk(b"data", bytes([192]) * 1_025)
    assert samples(riff(chunk(b"fmt ", layout(1, 8, channels=1_024)), data)) == [2**14]
    with pytest.raises(ValueError, match=r"^the WAV's format contradicts itself$"):
        wav.decode(riff(chunk(b"fmt ", layout(1, 8, channels=1_025)), data))


def test_it_looks_at_a_thousand_chunks() -> None:
    rest = chunk(b"fmt ", MONO) + chunk(b"data", pcm(1))
    assert samples(riff(chunk(b"JUNK", b"") * 998, rest)) == [1]
    with pytest.raises(ValueError, match=r"^the WAV has no format or no data$"):
        wav.decode(riff(chunk(b"JUNK", b"") * 999, rest))


def test_a_hostile_header_is_read_or_refused() -> None:
    chance = random.Random(7)
    form = chunk(b"fmt ", extensible(1, 24, valid=20))
    whole = riff(chunk(b"LIST", b"abc"), form, chunk(b"fact", bytes(4)), chunk(b"data", bytes(90)))
    odd = [0, 1, 2, 3, 0x7F, 0xFF, 0x11, 0x31, 0x55, 0x7FFF, 0xFFFE, 0x7FFFFFFF, 1 << 31, UNKNOWN]
    names = [b"RIFF", b"RF64", b"WAVE", b"fmt ", b"data", b"PEAK", b"cue ", b"smpl", b"bext"]
    read = 0
    for _ in range(3_000):
        file = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(whole))
            match chance.randrange(4):
                case 0:
                    file[at : at + 4] = struct.pack("<I", chance.choice(odd))
                case 1:
                    file[at : at + 2] = struct.pack("<H", chance.choice(odd) & 0xFFFF)
                case 2:
                    file[at:at] = chance.choice(names)
                case _:
                    del file[at : at + chance.randint(1, 60)]
        with contextlib.suppress(ValueError):
            assert len(wav.decode(bytes(file)).samples) <= len(file)
            read += 1
    # Both happen: the changes are neither harmless nor all fatal.
    assert 300 < read < 2_700


@pytest.mark.parametrize("trailing", [b"LIST", b"LIST\1\0\0"])
def test_a_chunk_whose_head_is_cut_off_is_none(trailing: bytes) -> None:
    assert samples(riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(1)), trailing)) == [1]


NO_WAV = "this must be a WAV file"
WANTED = "the WAV must hold PCM of 8 to 32 bits or floats of 32 or 64 bits"
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NO_WAV),
    "no RIFF": (b"RIFX" + riff(chunk(b"fmt ", MONO))[4:], NO_WAV),
    "no WAVE": (b"RIFF\0\0\0\0AVI " + chunk(b"fmt ", MONO), NO_WAV),
    "no chunks": (riff(), "the WAV has no format or no data"),
    "no data": (riff(chunk(b"fmt ", MONO)), "the WAV has no format or no data"),
    "no format": (riff(chunk(b"data", pcm(1))), "the WAV has no format or no data"),
    "half a format": (
        riff(chunk(b"fmt ", MONO[:15]), chunk(b"data", pcm(1))),
        "the WAV's format is cut off",
    ),
    "no channels": (
        riff(chunk(b"fmt ", layout(1, 16, channels=0)), chunk(b"data", pcm(1))),
        "the WAV's format contradicts itself",
    ),
    "no rate": (
        riff(chunk(b"fmt ", layout(1, 16, rate=0)), chunk(b"data", pcm(1))),
        "the WAV's format contradicts itself",
    ),
    "half a sample a channel": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 2, 8000, 1, 3, 16)), chunk(b"data", pcm(1))),
        "the WAV's format contradicts itself",
    ),
    "more samples a second than there are": (
        riff(chunk(b"fmt ", layout(1, 8, rate=1 << 31)), chunk(b"data", pcm(1))),
        "the WAV's format contradicts itself",
    ),
    "no bits": (riff(chunk(b"fmt ", layout(1, 0, size=1)), chunk(b"data", pcm(1))), WANTED),
    "40 bits": (riff(chunk(b"fmt ", layout(1, 40)), chunk(b"data", bytes(5))), WANTED),
    "16 bits in four bytes": (
        riff(chunk(b"fmt ", layout(1, 16, size=4)), chunk(b"data", bytes(4))),
        WANTED,
    ),
    "16 bits in one byte": (
        riff(chunk(b"fmt ", layout(1, 16, size=1)), chunk(b"data", bytes(4))),
        WANTED,
    ),
    "16-bit floats": (riff(chunk(b"fmt ", layout(3, 16)), chunk(b"data", pcm(1))), WANTED),
    "mu-law": (riff(chunk(b"fmt ", layout(7, 8)), chunk(b"data", b"12")), WANTED),
    "ADPCM": (
        riff(chunk(b"fmt ", layout(0x11, 4) + b"\2\0\xf9\1"), chunk(b"data", bytes(256))),
        WANTED,
    ),
    "GSM": (
        riff(chunk(b"fmt ", layout(0x31, 0, size=65) + b"\2\0\x40\1"), chunk(b"data", bytes(65))),
        WANTED,
    ),
    "MP3 in a WAV": (
        riff(chunk(b"fmt ", layout(0x55, 0, channels=2, size=1)), chunk(b"data", bytes(64))),
        WANTED,
    ),
    "MP3 of a frame that contradicts its channels": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 0x55, 2, 8000, 1, 1, 0)), chunk(b"data", b"12")),
        WANTED,
    ),
    "extensible without its tag": (
        riff(chunk(b"fmt ", extensible(1, 16)[:25]), chunk(b"data", pcm(1))),
        WANTED,
    ),
    "extensible of an unknown tag": (
        riff(chunk(b"fmt ", extensible(65_533, 16)), chunk(b"data", pcm(1))),
        WANTED,
    ),
    "FLAC": (b"fLaC\0\0\0\x22" + bytes(34), NO_WAV),
    "Ogg": (b"OggS" + bytes(60), NO_WAV),
    "AIFF": (b"FORM\0\0\0\x2eAIFFCOMM" + bytes(40), NO_WAV),
    "RF64": (b"RF64" + riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(1)))[4:], NO_WAV),
    "not a number": (
        riff(chunk(b"fmt ", layout(3, 32)), chunk(b"data", np.array([0, np.nan], "<f4").tobytes())),
        "the WAV holds samples that are not numbers",
    ),
    "infinite": (
        riff(chunk(b"fmt ", layout(3, 64)), chunk(b"data", np.array([np.inf, 0], "<f8").tobytes())),
        "the WAV holds samples that are not numbers",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_wav_is_refused_with_the_reason(kind: str) -> None:
    file, reason = BAD[kind]
    with pytest.raises(ValueError, match=f"^{reason}$"):
        wav.decode(file)


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_without_libsndfile_it_says_what_to_install(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Missing:
        """Finds soundfile, which does not load."""

        def find_spec(self, name: str, *_: object) -> None:
            if name == "soundfile":
                raise error("no such library")

    monkeypatch.delitem(sys.modules, "soundfile", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing()])
    with pytest.raises(VoiceUnavailable) as caught:
        wav.decode(riff(chunk(b"fmt ", MONO), chunk(b"data", pcm(1))))
    assert caught.value.detail == (
        "WAV files cannot be read; install soundfile for this platform, or send no reference."
    )
    assert caught.value.retry_after == 60
    assert caplog.messages == ["libsndfile cannot be loaded: no such library"]


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


def test_samples_from_a_model_are_cut_to_16_bits() -> None:
    samples = np.array([0.0, 0.5, 1.0, -1.0, 2.0, -2.0, np.nan, np.inf, -np.inf], np.float32)
    expected = [0, 16383, 32767, -32767, 32767, -32767, 0, 32767, -32767]
    assert wav.pcm(samples).tolist() == expected


# Another sample rate


def test_resampling_keeps_a_tone_and_its_length() -> None:
    seconds, loudness = 0.5, 10_000
    for old, new in ((22_050, 24_000), (16_000, 24_000), (48_000, 24_000), (24_001, 24_000)):
        times = np.arange(round(seconds * old)) / old
        # It fades in and out, as the parts of a speech do.
        envelope = np.sin(np.pi * times / seconds) ** 2
        tone = (loudness * envelope * np.sin(2 * np.pi * 440 * times)).astype(np.int16)
        changed = wav.resample(Wav(tone, old), new)
        assert (changed.sample_rate, changed.samples.dtype) == (new, np.dtype(np.int16))
        assert len(changed.samples) == -(-len(tone) * new // old)
        times = np.arange(len(changed.samples)) / new
        envelope = np.sin(np.pi * times / seconds) ** 2
        expected = loudness * envelope * np.sin(2 * np.pi * 440 * times)
        assert np.abs(changed.samples - expected).max() < 3, old


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    speech = Wav(np.arange(-5, 5, dtype=np.int16), 24_000)
    same = wav.resample(speech, 24_000)
    assert same.samples is speech.samples
    assert same.sample_rate == 24_000


def test_resampling_does_not_wrap_round_at_full_scale() -> None:
    square = np.repeat(np.array([32_767, -32_768] * 20, np.int16), 50)
    changed = wav.resample(Wav(square, 22_050), 24_000).samples
    assert (changed.min(), changed.max()) == (-32_768, 32_767)
    # 50 samples become 54.4: all but the edges have the sign of their half wave.
    for number in range(40):
        start, end = (int((number + part) * 50 * 24_000 / 22_050) for part in (0.05, 0.95))
        assert set(np.sign(changed[start:end])) == {1 if number % 2 == 0 else -1}, number


def test_resampling_takes_silence_and_nothing() -> None:
    assert wav.resample(Wav(np.zeros(147, np.int16), 22_050), 24_000).samples.tolist() == [0] * 160
    nothing = wav.resample(Wav(np.zeros(0, np.int16), 22_050), 24_000)
    assert (nothing.samples.tolist(), nothing.sample_rate) == ([], 24_000)


def test_an_open_header_is_that_of_a_file_whose_sizes_are_not_known() -> None:
    header = wav.open_header(8000)
    assert header == (
        b"RIFF\xff\xff\xff\xffWAVE" + b"fmt \x10\0\0\0" + MONO + b"data\xff\xff\xff\xff"
    )
    samples = np.array([1, -2, 300], np.int16)
    file = header + wav.pcm_bytes(Wav(samples, 8000))
    assert wav.decode(file).samples.tolist() == [1, -2, 300]


def test_pcm_bytes_are_little_endian() -> None:
    assert wav.pcm_bytes(Wav(np.array([1, -2], np.int16), 8000)) == b"\x01\0\xfe\xff"

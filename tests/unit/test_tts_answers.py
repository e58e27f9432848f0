"""Valid and invalid answers of a speech worker."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    SidecarError,
    VoiceUnavailable,
)
from llm_sidecar.tts import answers, wav
from llm_sidecar.tts.answers import RETRY_AFTER, Answers, WrongAnswer
from llm_sidecar.tts.messages import End, Failure, Part
from llm_sidecar.tts.voice import Wav


def part(index: int, samples: int = 8, rate: int = 8_000) -> str:
    file = wav.encode(Wav(np.full(samples, index + 1, np.int16), rate))
    return Part(index=index, wav_b64=base64.b64encode(file).decode()).model_dump_json()


def end(count: int) -> str:
    return End(end=count).model_dump_json()


def heard(text: str, *messages: str) -> list[int]:
    """The first sample of each part."""
    reader = Answers(text)
    parts = []
    for message in messages:
        assert reader.ended is False
        parts.append(reader.read(message))
    assert reader.ended is True
    return [int(spoken.samples[0]) for spoken in parts if spoken is not None]


def test_the_parts_of_a_text_are_read_in_order() -> None:
    assert heard("a b", part(0), part(1), end(2)) == [1, 2]


def test_a_text_without_a_sound_has_no_part() -> None:
    assert heard("a", end(0)) == []


@pytest.mark.parametrize("rate", [8_000, 192_000])
def test_the_lowest_and_the_highest_sample_rate_are_read(rate: int) -> None:
    spoken = Answers("a").read(part(0, rate=rate))
    assert spoken is not None
    assert spoken.sample_rate == rate


def test_a_part_that_two_workers_have_sent_is_heard_once() -> None:
    assert heard("a b c", part(0), part(1), part(0), part(1), part(2), end(3)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (["{"], "it is not a message"),
        (["{}"], "it is not a message"),
        (['{"index": "0", "wav_b64": ""}'], "it is not a message"),
        (['{"index": -1, "wav_b64": ""}'], "it is not a message"),
        ([part(1)], "a part is missing"),
        ([part(0), part(2)], "a part is missing"),
        ([part(0), end(2)], "the number of parts is wrong"),
        ([part(0), part(1), end(1)], "the number of parts is wrong"),
        (['{"index": 0, "wav_b64": "SECRET"}'], "a part is not a WAV"),
        (['{"index": 0, "wav_b64": "U0VDUkVU"}'], "a part is not a WAV"),
        ([part(0).replace("UklGR", "Ukl-GR")], "a part is not a WAV"),
        ([part(0, rate=7_999)], "a part has a wrong sample rate"),
        ([part(0, rate=192_001)], "a part has a wrong sample rate"),
        ([part(0), part(1, rate=8_001)], "a part has a wrong sample rate"),
        (
            [part(0), part(1), part(2), part(3), part(4)],
            "there are more parts than the text has characters",
        ),
    ],
)
def test_a_wrong_answer_is_named_and_not_quoted(messages: list[str], reason: str) -> None:
    reader = Answers("word")
    for message in messages[:-1]:
        reader.read(message)
    with pytest.raises(WrongAnswer, match=rf"^{reason}$"):
        reader.read(messages[-1])


def test_a_message_that_is_too_long_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LONGEST_ANSWER", len(end(0)))
    Answers("a").read(end(0))
    with pytest.raises(WrongAnswer, match=r"^it is too long$"):
        Answers("a").read(end(0) + " ")


def test_a_speech_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_SPEECH", 2 * 20)
    reader = Answers("a b")
    reader.read(part(0, samples=10))
    reader.read(part(1, samples=10))
    with pytest.raises(WrongAnswer, match=r"^the speech is too long$"):
        reader.read(part(2, samples=1))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("InvalidRequest", InvalidRequest),
        ("QueueFull", QueueFull),
        ("DeadlineExceeded", DeadlineExceeded),
        ("VoiceUnavailable", VoiceUnavailable),
        ("SettingsError", VoiceUnavailable),
        ("KeyboardInterrupt", VoiceUnavailable),
    ],
)
def test_a_failure_is_raised_as_an_error_of_its_kind(kind: str, error: type[SidecarError]) -> None:
    with pytest.raises(error) as caught:
        Answers("a").read(Failure(error="the reason", kind=kind).model_dump_json())
    assert type(caught.value) is error
    assert caught.value.detail == "the reason"
    assert caught.value.retry_after == (None if error is InvalidRequest else RETRY_AFTER)

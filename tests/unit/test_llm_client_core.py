"""A client's decisions: when to retry, how long to wait, and the meaning of an answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from llm_sidecar.settings import Settings
from osiris.llm_client import core
from osiris.llm_client.core import Core, Reply, as_connection_error, authorization
from osiris.llm_client.errors import (
    LLMClientConnectionError,
    LLMClientError,
    LLMClientHTTPError,
)
from osiris.llm_client.proxies import Proxy

NOW = 1_767_312_000.0
"""2026-01-02 00:00:00 UTC, in seconds since 1970."""
URL = httpx.URL("http://h")
REQUEST = httpx.Request("POST", "http://h/generate/", headers={"X-Request-ID": "ours"})


@pytest.fixture(autouse=True)
def without_chance(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The backoff's random part, which gives its greatest value; the ranges that were asked for."""
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", uniform)
    return ranges


def made(retries: int = 3, backoff_factor: float = 0.5, base_url: str | None = "http://h") -> Core:
    return Core(base_url, None, retries, backoff_factor, lambda: NOW)


def answer(status: int, *, detail: Any = None, text: str = "", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if detail is not None:
        return httpx.Response(status, json={"detail": detail}, headers=named)
    return httpx.Response(status, text=text, headers=named)


def carry_out(
    client: Core,
    replies: Iterable[Reply],
    read: Callable[[httpx.Response], Any] = lambda response: response.text,
) -> tuple[Any, list[float]]:
    """The result of `attempts`, and the seconds of each wait; each try must be the request."""
    waits: list[float] = []
    left = iter(replies)
    plan = client.attempts(REQUEST, read)
    step: httpx.Request | float = next(plan)
    try:
        while True:
            assert step is REQUEST
            step = plan.send(next(left))
            assert isinstance(step, float)
            waits.append(step)
            step = plan.send(None)
    except StopIteration as end:
        result = end.value
    except LLMClientError as error:
        result = error
    assert list(left) == [], "not every reply was asked for"
    return result, waits


# What it is made of


def test_the_url_is_the_arguments_the_environments_or_local(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OSIRIS_SIDECAR_URL", raising=False)
    assert made(base_url=None).base_url == httpx.URL("http://localhost:8000")
    monkeypatch.setenv("OSIRIS_SIDECAR_URL", "http://desk:9000")
    assert made(base_url=None).base_url == httpx.URL("http://desk:9000")
    assert made(base_url="https://other").base_url == httpx.URL("https://other")
    monkeypatch.setenv("OSIRIS_SIDECAR_URL", "")
    assert made(base_url=None).base_url == httpx.URL("http://localhost:8000")


NO_URLS = [
    "ftp://h",
    "h:8000",
    "http://",
    "/generate",
    "http://h:port",
    "http://h:0",
    "http://h:-1",
    "http://h:65536",
    "http://[::1",
    "http://a..b",
    f"http://{'a' * 64}",
    "http://xn--a",
    "http://me:hunter2@h\n",
]


@pytest.mark.parametrize("url", NO_URLS)
def test_an_invalid_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as caught:
        made(base_url=url)
    assert str(caught.value) == "base_url takes http://HOST:PORT or https://HOST:PORT"
    monkeypatch.setenv("OSIRIS_SIDECAR_URL", url)
    with pytest.raises(ValueError) as caught:
        made(base_url=None)
    assert str(caught.value) == "OSIRIS_SIDECAR_URL takes http://HOST:PORT or https://HOST:PORT"


@pytest.mark.parametrize("url", ["http://h?key=1", "http://h/path?a", "http://h#top"])
def test_a_url_with_a_query_or_a_fragment_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^base_url takes no query and no fragment$"):
        made(base_url=url)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        (0.5, httpx.Timeout(0.5)),
        (1, httpx.Timeout(1)),
        (365 * 24 * 3600, httpx.Timeout(365 * 24 * 3600)),
        (httpx.Timeout(None, connect=3), httpx.Timeout(None, connect=3)),
    ],
)
def test_a_timeout_is_seconds_or_one_for_each_wait(
    given: float | httpx.Timeout | None, kept: httpx.Timeout | None
) -> None:
    assert Core("http://h", given, 3, 0.5, lambda: NOW).timeout == kept


@pytest.mark.parametrize("url", ["http://h:1", "http://h:65535", "https://[::1]:8000", "http://h."])
def test_a_url_may_have_every_port(url: str) -> None:
    assert made(base_url=url).base_url == httpx.URL(url)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_timeout_that_cannot_be_waited_for_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^timeout takes seconds, above 0 up to a year$"):
        Core("http://h", seconds, 3, 0.5, lambda: NOW)


@pytest.mark.parametrize(
    "arguments", [{"retries": -1}, {"backoff_factor": -0.1}, {"backoff_factor": float("nan")}]
)
def test_negative_numbers_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^retries and backoff_factor are 0 or more$"):
        made(**arguments)
    made(retries=0, backoff_factor=0.0)


# Trying again


def test_an_answer_is_read_and_nothing_tried_again() -> None:
    assert carry_out(made(), [answer(200, text="fine")]) == ("fine", [])
    assert carry_out(made(), [answer(204)], lambda response: response.status_code) == (204, [])


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 599])
def test_a_busy_or_broken_server_is_tried_again(status: int) -> None:
    assert carry_out(made(), [answer(status), answer(200, text="fine")]) == ("fine", [0.5])


@pytest.mark.parametrize("status", [301, 400, 401, 404, 408, 413, 422, 428, 430, 499])
def test_another_error_is_not(status: int) -> None:
    error, waits = carry_out(made(), [answer(status)])
    assert isinstance(error, LLMClientHTTPError)
    assert (error.status, waits) == (status, [])


def test_a_stream_that_fails_before_its_first_event_is_tried_again() -> None:
    plan = made(retries=3).streams(REQUEST)
    begun, failed = answer(200), answer(504, detail="late", Retry_After="7")
    assert next(plan) is REQUEST
    assert plan.send(answer(503)) == 0.5
    assert plan.send(None) is REQUEST
    assert plan.send(begun) is begun
    assert plan.send(failed) == 7.0
    assert plan.send(None) is REQUEST
    assert plan.send(begun) is begun
    assert plan.send(httpx.ReadError("reset")) == 2.0
    assert plan.send(None) is REQUEST
    assert plan.send(begun) is begun
    with pytest.raises(LLMClientHTTPError, match="HTTP 504: late"):
        plan.send(failed)


def test_a_broken_connection_is_tried_again() -> None:
    broken = httpx.ReadError("reset")
    assert carry_out(made(), [broken, answer(200, text="fine")]) == ("fine", [0.5])


@pytest.mark.parametrize(("retries", "waits"), [(0, []), (1, [0.5]), (3, [0.5, 1.0, 2.0])])
def test_the_last_try_raises_what_it_came_to(retries: int, waits: list[float]) -> None:
    replies = [answer(500 + number) for number in range(retries + 1)]
    error, waited = carry_out(made(retries), replies)
    assert isinstance(error, LLMClientHTTPError)
    assert error.status == 500 + retries
    assert waited == waits
    broken = httpx.ConnectError("refused")
    error, waited = carry_out(made(retries), [broken] * (retries + 1))
    assert isinstance(error, LLMClientConnectionError)
    assert (str(error), error.__cause__) == ("ConnectError: refused", broken)
    assert waited == waits


def test_a_broken_connection_without_a_text_has_its_name() -> None:
    error, _ = carry_out(made(0), [httpx.ReadTimeout("")])
    assert str(error) == "ReadTimeout"


def test_a_broken_connection_names_the_variable_of_the_proxy() -> None:
    client = made(0)
    client.proxy = Proxy("HTTP_PROXY", "http://me:hunter2@h")
    error, _ = carry_out(client, [httpx.ConnectError("refused")])
    assert str(error) == "ConnectError: refused (through the proxy that HTTP_PROXY names)"
    assert "hunter2" not in repr(client.proxy)


def test_the_backoff_doubles_up_to_thirty_seconds(
    without_chance: list[tuple[float, float]],
) -> None:
    _, waits = carry_out(made(8), [answer(503)] * 9)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    # Up to half of it less, at random.
    assert set(without_chance) == {(0.5, 1.0)}
    _, waits = carry_out(made(2, backoff_factor=7.0), [answer(503)] * 3)
    assert waits == [7.0, 14.0]
    _, waits = carry_out(made(2, backoff_factor=0.0), [answer(503)] * 3)
    assert waits == [0.0, 0.0]


def test_the_backoffs_random_part_shortens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    _, waits = carry_out(made(8), [answer(503)] * 9)
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


def test_thousands_of_tries_do_not_overflow_the_backoff() -> None:
    _, waits = carry_out(made(1100), [answer(503)] * 1101)
    assert waits[-1] == 30.0


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [
        ("7", 7.0),
        ("0", 0.5),
        ("120", 120.0),
        ("000000009", 9.0),
        ("Fri, 02 Jan 2026 00:00:40 GMT", 40.0),
        ("Fri, 02 Jan 2026 01:00:40 +0100", 40.0),
        ("1.5", 1.5),
        ("7.", 7.0),
        # A date without a zone, or with one that it does not know, is in UTC.
        ("Fri, 02 Jan 2026 00:00:40", 40.0),
        ("Fri, 02 Jan 2026 00:00:40 -0000", 40.0),
        ("Fri, 02 Jan 2026 00:00:40 XYZ", 40.0),
        # The past, or what says nothing, leaves the backoff.
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0.5),
        ("soon", 0.5),
        ("-5", 0.5),
        ("", 0.5),
        ("7, 9", 0.5),
        ("nan", 0.5),
        ("inf", 0.5),
        ("1e9", 0.5),
        (".5", 0.5),
        ("Mon, 99 Jan 2026 00:00:00 GMT", 0.5),
        ("Fri, 02 Jan 2026 25:00:00 GMT", 0.5),
        ("Fri, 02 Jan 2026 00:00:40 +99999999", 0.5),
        (f"Fri, 02 Jan {10**30} 00:00:40 GMT", 0.5),
        (f"Fri, {'9' * 5000} Jan 2026 00:00:40 GMT", 0.5),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.5),
    ],
)
def test_a_server_is_asked_again_when_it_says(retry_after: str, wait: float) -> None:
    replies = [answer(503, Retry_After=retry_after), answer(200, text="fine")]
    assert carry_out(made(), replies) == ("fine", [wait])


def test_a_date_without_a_zone_is_in_utc_wherever_the_client_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "NPT-5:45")
    time.tzset()
    try:
        error = raised(answer(503, Retry_After="Fri, 02 Jan 2026 00:00:40"))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert error.retry_after == 40.0


def test_digits_of_other_scripts_say_nothing() -> None:
    busy = httpx.Response(503, headers=[(b"Retry-After", "\u0667".encode())])
    assert carry_out(made(), [busy, answer(200, text="fine")]) == ("fine", [0.5])


def test_of_two_retry_after_headers_the_longer_wait_counts() -> None:
    values = [("Retry-After", value) for value in ("3", "soon", "7", "5")]
    busy = httpx.Response(503, headers=values)
    assert carry_out(made(), [busy, answer(200, text="fine")]) == ("fine", [7.0])


@pytest.mark.parametrize(
    "retry_after", [str(10**30), "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT", "99999999.5"]
)
def test_more_than_a_year_counts_as_a_year(retry_after: str) -> None:
    error, waits = carry_out(made(), [answer(503, Retry_After=retry_after)])
    assert isinstance(error, LLMClientHTTPError)
    assert (error.retry_after, waits) == (365 * 24 * 3600.0, [])


@pytest.mark.parametrize("retry_after", ["121", "999999999", "Fri, 02 Jan 2026 00:02:01 GMT"])
def test_one_that_says_more_than_two_minutes_is_not_waited_for(retry_after: str) -> None:
    error, waits = carry_out(made(), [answer(503, Retry_After=retry_after)])
    assert isinstance(error, LLMClientHTTPError)
    assert (error.status, waits) == (503, [])


def test_each_retry_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    busy = answer(503, detail="loading", X_Request_ID="theirs")
    carry_out(made(), [busy, answer(200)])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "POST /generate/: HTTP 503: loading (request theirs); retry in 0.5 s")
    ]


# Errors


def raised(reply: httpx.Response) -> LLMClientHTTPError:
    error, _ = carry_out(made(0), [reply])
    assert isinstance(error, LLMClientHTTPError)
    return error


def test_an_error_has_detail_request_id_and_retry_after() -> None:
    error = raised(answer(429, detail="The queue is full.", X_Request_ID="theirs", Retry_After="4"))
    assert (error.status, error.detail) == (429, "The queue is full.")
    assert (error.request_id, error.retry_after) == ("theirs", 4.0)
    assert str(error) == "HTTP 429: The queue is full. (request theirs)"


def test_an_error_without_them_has_our_request_id_and_no_retry_after() -> None:
    error = raised(answer(422, detail=[{"loc": ["body", "prompt"]}]))
    assert error.detail == [{"loc": ["body", "prompt"]}]
    assert (error.request_id, error.retry_after) == ("ours", None)


def test_an_error_says_where_a_finished_proposal_is_stored() -> None:
    late = httpx.Response(504, json={"detail": "hermes is late", "transaction_id": "t-1"})
    assert raised(late).transaction_id == "t-1"
    assert raised(answer(504, detail="phi3 is late")).transaction_id is None
    assert raised(answer(502, text="<h1>Bad gateway</h1>")).transaction_id is None


@pytest.mark.parametrize("page", ["<h1>Bad gateway</h1>", '"text"', "[]", '{"error": "x"}', ""])
def test_the_detail_of_a_foreign_error_page_is_its_text(page: str) -> None:
    assert raised(answer(502, text=page)).detail == page


def test_a_deeply_nested_error_page_is_text() -> None:
    page = "[" * 100_000
    assert raised(answer(502, text=page)).detail == page


def test_a_retry_after_in_the_past_is_zero_seconds() -> None:
    assert raised(answer(503, Retry_After="Thu, 01 Jan 2026 00:00:00 GMT")).retry_after == 0.0


# Probes


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (answer(200), True),
        (answer(204), True),
        (answer(503), False),
        (httpx.ConnectError("refused"), False),
    ],
)
def test_a_probe_asks_once(reply: Reply, found: bool) -> None:
    plan = made().probe(REQUEST)
    assert next(plan) is REQUEST
    with pytest.raises(StopIteration) as end:
        plan.send(reply)
    assert end.value.value is found


@pytest.mark.parametrize("status", [401, 404, 500, 502, 504])
def test_a_probe_that_is_neither_ready_nor_unready_is_an_error(status: int) -> None:
    plan = made().probe(REQUEST)
    next(plan)
    with pytest.raises(LLMClientHTTPError) as caught:
        plan.send(answer(status, detail="no", Retry_After="3"))
    assert (caught.value.status, caught.value.detail) == (status, "no")
    assert (caught.value.request_id, caught.value.retry_after) == ("ours", 3.0)


# Streams


def test_what_breaks_a_stream_is_a_connection_error() -> None:
    broken = httpx.ReadError("reset")
    failure = pytest.raises(LLMClientConnectionError, match=r"^ReadError: reset$")
    with failure as caught, as_connection_error():
        raise broken
    assert caught.value.__cause__ is broken
    with pytest.raises(KeyError), as_connection_error():
        raise KeyError


# Keys


def test_the_key_is_the_arguments_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDECAR_API_KEY", raising=False)
    assert authorization(None, URL) == {}
    monkeypatch.setenv("SIDECAR_API_KEY", "")
    assert authorization(None, URL) == {}
    monkeypatch.setenv("SIDECAR_API_KEY", "theirs")
    assert authorization(None, URL) == {"Authorization": "Bearer theirs"}
    assert authorization("ours", URL) == {"Authorization": "Bearer ours"}


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel", "tab\t", "\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_unrepeated(key: str) -> None:
    with pytest.raises(ValueError, match=r"^an API key is one word of ASCII characters$"):
        authorization(key, URL)


@pytest.mark.parametrize("key", ["!", "~", "a-key_of.16/chars+="])
def test_a_key_may_have_every_visible_character(key: str) -> None:
    assert authorization(key, URL) == {"Authorization": f"Bearer {key}"}


def test_a_key_does_not_replace_the_password_of_the_url() -> None:
    url = httpx.URL("http://me:hunter2@h")
    assert authorization("ours", url) == {"X-API-Key": "ours"}
    assert authorization(None, url) == {}


def test_the_bounds_are_the_documented_ones() -> None:
    bounds: list[float] = [core.LONGEST_BACKOFF, core.LONGEST_RETRY_AFTER]
    assert bounds == [30.0, 120.0]


def test_the_client_waits_longer_than_the_servers_deadlines() -> None:
    settings = Settings()
    # A body must arrive within its own time before the deadline counts.
    assert settings.limits.body_timeout + settings.limits.request_timeout + 5 <= core.ANSWER_TIMEOUT
    assert settings.limits.body_timeout + settings.speech.timeout + 5 <= core.SPEECH_TIMEOUT

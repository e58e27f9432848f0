"""The decisions of a client, without input or output (https://sans-io.readthedocs.io).

Generators decide when to retry and what an answer means. They yield a request, or seconds to wait,
and receive the result. The blocking and the async client only carry this out.
"""

from __future__ import annotations

import email.utils
import logging
import os
import random
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC
from typing import Final, TypeVar

import httpx

from osiris.llm_client.errors import (
    LLMClientConnectionError,
    LLMClientError,
    LLMClientHTTPError,
)
from osiris.llm_client.proxies import Proxy, parse_url

DEFAULT_URL: Final = "http://localhost:8000"
CONNECT_TIMEOUT: Final = 5.0
"""Seconds in which a connection must be made, unless the caller gives a timeout."""
ANSWER_TIMEOUT: Final = 75.0
"""Maximum seconds without a byte of an answer. Longer than the server's REQUEST_TIMEOUT_SECONDS
(default 60) plus BODY_TIMEOUT_SECONDS (default 10), so that its own error arrives first.
"""
SPEECH_TIMEOUT: Final = 135.0
"""The same for speech: TTS_TIMEOUT_SECONDS is 120 by default."""
PROBE_TIMEOUT: Final = 5.0
"""The same for a probe, which the server answers at once."""
LONGEST_BACKOFF: Final = 30.0
"""Maximum seconds between two attempts, unless the server asks for more."""
LONGEST_RETRY_AFTER: Final = 120.0
"""If the server asks for more seconds than this, the client does not retry."""
YEAR: Final = 365 * 24 * 3600.0
"""Seconds in a year. Sockets and clocks do not support much longer waits."""

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Reply = httpx.Response | httpx.RequestError | None
"""The result of a request; None after a wait."""
Plan = Generator[httpx.Request | float, Reply, Answer]
"""Yields a request, or seconds to wait; receives the result; returns the answer."""
StreamPlan = Generator[httpx.Request | float | httpx.Response, Reply, None]
"""Also yields the response of a stream, and never returns."""


class Core:
    """Settings of a client and its decisions, without any input or output.

    Attributes:
        base_url: address of the sidecar.
        timeout: the caller's timeout for all requests; None to use the default of each request.
        proxy: the proxy of the requests; None for a direct connection.
    """

    proxy: Proxy | None = None

    def __init__(
        self,
        base_url: str | None,
        timeout: float | httpx.Timeout | None,
        retries: int,
        backoff_factor: float,
        clock: Callable[[], float],
    ) -> None:
        given = base_url or os.environ.get("OSIRIS_SIDECAR_URL") or DEFAULT_URL
        source = "base_url" if base_url else "OSIRIS_SIDECAR_URL"
        url = parse_url(given)
        if url is None or url.scheme not in ("http", "https"):
            raise ValueError(f"{source} takes http://HOST:PORT or https://HOST:PORT")
        self.base_url = url
        if self.base_url.query or self.base_url.fragment:
            raise ValueError(f"{source} takes no query and no fragment")
        if not (retries >= 0 and backoff_factor >= 0):
            raise ValueError("retries and backoff_factor are 0 or more")
        if isinstance(timeout, int | float):
            if not 0 < timeout <= YEAR:
                raise ValueError("timeout takes seconds, above 0 up to a year")
            timeout = httpx.Timeout(timeout)
        self.timeout = timeout
        self._retries = retries
        self._backoff_factor = backoff_factor
        self._clock = clock

    def attempts(
        self, request: httpx.Request, read: Callable[[httpx.Response], Answer]
    ) -> Plan[Answer]:
        """Sends a request until it succeeds, cannot succeed, or has been retried often enough."""
        failures = 0
        while True:
            reply = yield request
            if isinstance(reply, httpx.Response) and reply.is_success:
                return read(reply)
            yield self._wait(request, reply, failures)
            failures += 1

    def streams(self, request: httpx.Request) -> StreamPlan:
        """Like `attempts`, but also retries a stream that fails before its first event.

        It also yields each response of a stream, and receives the error that prevented its first
        event.
        """
        failures = 0
        while True:
            reply = yield request
            if isinstance(reply, httpx.Response) and reply.is_success:
                reply = yield reply
            yield self._wait(request, reply, failures)
            failures += 1

    def probe(self, request: httpx.Request) -> Plan[bool]:
        """Sends a request once; True for 2xx, False for 503 or if the sidecar cannot be reached."""
        reply = yield request
        if isinstance(reply, httpx.Response) and not reply.is_success and reply.status_code != 503:
            raise self.http_error(request, reply)
        return isinstance(reply, httpx.Response) and reply.is_success

    def http_error(self, request: httpx.Request, reply: httpx.Response) -> LLMClientHTTPError:
        """The error that an answer with an error status means."""
        transaction_id = None
        try:
            body = reply.json()
            detail = body["detail"]
            transaction_id = body.get("transaction_id")
        # This is not from the sidecar; it may be an error page of a proxy.
        except (ValueError, KeyError, TypeError, RecursionError):
            detail = reply.text
        request_id = reply.headers.get("X-Request-ID", request.headers["X-Request-ID"])
        asked = map(self._seconds, reply.headers.get_list("Retry-After"))
        retry_after = max((each for each in asked if each is not None), default=None)
        return LLMClientHTTPError(
            reply.status_code, detail, request_id, retry_after, transaction_id
        )

    def _wait(self, request: httpx.Request, reply: Reply, failures: int) -> float:
        """Seconds until the next attempt; raises the error if this one was the last."""
        error, wait = self._judge(request, reply, failures)
        if wait is None or failures == self._retries:
            raise error
        log.warning("%s %s: %s; retry in %.1f s", request.method, request.url.path, error, wait)
        return wait

    def _judge(
        self, request: httpx.Request, reply: Reply, failures: int
    ) -> tuple[LLMClientError, float | None]:
        """The error to raise if this attempt is the last, and the seconds until the next one, or
        None to stop."""
        doubled = self._backoff_factor * 2.0 ** min(failures, 64)
        wait = min(LONGEST_BACKOFF, doubled) * random.uniform(0.5, 1.0)
        if not isinstance(reply, httpx.Response):
            route = f" (through the proxy that {self.proxy.variable} names)" if self.proxy else ""
            # asyncio's timeouts have no text.
            what = f"{type(reply).__name__}: {reply}".removesuffix(": ")
            broken = LLMClientConnectionError(what + route)
            broken.__cause__ = reply
            return broken, wait
        error = self.http_error(request, reply)
        wait = max(wait, error.retry_after or 0.0)
        again = (error.status == 429 or error.status >= 500) and wait <= LONGEST_RETRY_AFTER
        return error, wait if again else None

    def _seconds(self, retry_after: str) -> float | None:
        """Seconds or an HTTP date (RFC 9110, section 10.2.3); None for anything else."""
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?", retry_after):
            return min(float(retry_after), YEAR)
        try:
            when = email.utils.parsedate_to_datetime(retry_after)
            # An HTTP date is in UTC, even if it does not say so.
            seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
        return min(max(0.0, seconds - self._clock()), YEAR)


def authorization(api_key: str | None, url: httpx.URL) -> dict[str, str]:
    """The header with the key; without a key, with the one in `SIDECAR_API_KEY`, if any.

    Raises:
        ValueError: the key has characters that a header cannot contain.
    """
    if api_key is None:
        api_key = os.environ.get("SIDECAR_API_KEY") or None
    if api_key is None:
        return {}
    if not re.fullmatch("[!-~]+", api_key):  # httpx would repeat the key in its own error
        raise ValueError("an API key is one word of ASCII characters")
    # httpx sends the user and password of the URL as `Authorization`.
    return {"X-API-Key": api_key} if url.userinfo else {"Authorization": f"Bearer {api_key}"}


@contextmanager
def as_connection_error() -> Iterator[None]:
    """Turns httpx's errors during a stream into the client's own error."""
    try:
        yield
    except httpx.RequestError as error:
        raise LLMClientConnectionError(f"{type(error).__name__}: {error}") from error

"""HTTP to one server, within bounds: the size of an answer, and the time of a request."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import SecretStr

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.remote.refusals import InvalidAnswer, broken, refusal, unreachable
from llm_sidecar.telemetry.trace_context import traceparent

_OK: Final = 200
_CLOSED: Final = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
_CONNECTED: Final = "connection.connect_tcp.complete"
"""The trace event of a new connection; see httpcore."""
_CONNECT_SECONDS: Final = 5.0
_MOST_BYTES: Final = 4 << 20
"""Maximum size of an answer that is not streamed."""
_MOST_ERROR_BYTES: Final = 1 << 16
_MOST_LINE_BYTES: Final = 1 << 20
_MOST_SILENCE: Final = 30.0
"""Maximum seconds between two pieces of a stream. The first one may take until the deadline."""
_KEPT_SECONDS: Final = 4.0
"""How long to keep an idle connection; uvicorn closes it after 5 seconds."""


def make_client(
    connections: int, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """A client that verifies certificates, follows no redirect, keeps no cookie and reads no
    environment variable.

    Args:
        connections: the maximum number at the same time.
        transport: of a test.
    """
    return httpx.AsyncClient(
        transport=transport,
        # Trust the authorities of this machine, so that private ones work too. Reading them takes
        # tens of milliseconds, and another transport does not use them.
        verify=ssl.create_default_context() if transport is None else True,
        trust_env=False,
        # A server could fill the memory with cookies.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        follow_redirects=False,
        # The deadline bounds the other phases.
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=connections, keepalive_expiry=_KEPT_SECONDS),
    )


class Connection:
    """One server.

    Attributes:
        url: its base URL without credentials.
        name: the subject of its errors.
        last_byte: when it last sent a part of a body, on the clock of `time.monotonic`.
    """

    def __init__(
        self, client: httpx.AsyncClient, model: str, url: SecretStr, key: SecretStr | None
    ) -> None:
        """Opens nothing.

        Args:
            client: see `make_client`.
            model: `phi3` or `hermes`.
            url: of the API, for example http://gpu-1:8000/v1; may have a user and a password.
            key: of the API; replaces user and password.
        """
        parsed = urlsplit(url.get_secret_value())
        host = parsed.netloc.rpartition("@")[2]
        self.url = urlunsplit(parsed._replace(netloc=host, path=parsed.path.rstrip("/") or "/v1"))
        self.name = f"The {model} server {host}"
        self.last_byte = 0.0
        self._client = client
        self._headers = {"Accept-Encoding": "identity"}
        self._auth: httpx.Auth | None = None
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key.get_secret_value()}"
        elif parsed.username is not None:
            own = httpx.URL(url.get_secret_value())
            self._auth = httpx.BasicAuth(own.username, own.password)

    async def get(self, path: str, deadline: Deadline) -> bytes:
        """The body of a GET request.

        Raises:
            SidecarError: see `refusals`.
            TimeoutError: the deadline passes.
        """
        async with self._answer("GET", path, None, deadline) as response:
            return await self._read(response, _MOST_BYTES, deadline)

    async def post(self, path: str, body: Mapping[str, Any], deadline: Deadline) -> bytes:
        """The body of the answer to a POST request; see `get`."""
        async with self._answer("POST", path, body, deadline) as response:
            return await self._read(response, _MOST_BYTES, deadline)

    async def events(
        self, path: str, body: Mapping[str, Any], most_bytes: int, deadline: Deadline
    ) -> AsyncGenerator[bytes, None]:
        """The data of each server-sent event of the answer to a POST request; see `get`.

        Closing it closes the connection, which stops the generation on the server.

        Args:
            most_bytes: maximum size of the whole answer.
        """
        started = bytearray()
        async with (
            self._answer("POST", path, body, deadline) as response,
            contextlib.aclosing(self._chunks(response, most_bytes, deadline)) as chunks,
        ):
            async for chunk in chunks:
                started += chunk
                if b"\n" in chunk:
                    *lines, started = started.split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:"):
                            yield bytes(line[5:].strip())
                if len(started) > _MOST_LINE_BYTES:
                    raise broken(self.name, "sends an event that is too long")

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, deadline: Deadline
    ) -> AsyncIterator[httpx.Response]:
        """The answer of a request that succeeds, before its body; closes it at the end."""
        headers = dict(self._headers)
        if (trace := traceparent.get()) is not None:
            headers["traceparent"] = trace
        connected = False

        async def trace_transport(event: str, info: Any) -> None:
            nonlocal connected
            connected = connected or event == _CONNECTED

        with self._transport_errors():
            url = self.url + path
            request = self._client.build_request(
                method, url, json=body, headers=headers, extensions={"trace": trace_transport}
            )
            try:
                response = await self._send(request, deadline)
            except _CLOSED:
                if connected:
                    # This request may be what broke a new connection.
                    raise
                # The server has probably just closed this idle connection.
                response = await self._send(request, deadline)
        async with contextlib.aclosing(response):
            if response.status_code != _OK:
                raise await self._refusal(response, deadline)
            yield response

    async def _send(self, request: httpx.Request, deadline: Deadline) -> httpx.Response:
        async with deadline.timeout():
            return await self._client.send(request, stream=True, auth=self._auth)

    async def _refusal(self, response: httpx.Response, deadline: Deadline) -> Exception:
        text = b""
        # The status suffices if the body is too long or truncated.
        with contextlib.suppress(InvalidAnswer):
            text = await self._read(response, _MOST_ERROR_BYTES, deadline)
        return refusal(self.name, response.status_code, response.headers, text)

    async def _read(self, response: httpx.Response, most: int, deadline: Deadline) -> bytes:
        return b"".join([chunk async for chunk in self._chunks(response, most, deadline)])

    async def _chunks(
        self, response: httpx.Response, most: int, deadline: Deadline
    ) -> AsyncGenerator[bytes, None]:
        """The body as it comes."""
        chunks, total, limit = response.aiter_raw(), 0, deadline
        while True:
            with self._transport_errors():
                try:
                    async with limit.timeout():
                        chunk = await anext(chunks, b"")
                except TimeoutError:
                    if limit is deadline:
                        raise
                    raise broken(self.name, f"sent nothing for {_MOST_SILENCE:g} s") from None
            if not chunk:
                return
            self.last_byte = time.monotonic()
            total += len(chunk)
            if total > most:
                raise broken(self.name, "sends too many bytes")
            yield chunk
            if deadline.remaining() > _MOST_SILENCE:
                limit = Deadline.after(_MOST_SILENCE)
            else:
                limit = deadline

    @contextlib.contextmanager
    def _transport_errors(self) -> Iterator[None]:
        """Turns the errors of httpx into ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL) as error:
            raise unreachable(self.name, error) from None
        except httpx.HTTPError as error:
            raise broken(self.name, f"broke off ({type(error).__name__})") from None

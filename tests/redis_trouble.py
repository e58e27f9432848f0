"""A sidecar under a steady load, on a Redis that is in trouble, one kind after the other.

async with sidecar(folder) as troubled:
    async with troubled.trouble("slow"):
        await troubled.load.run(10.0)
    await troubled.recovered()
    troubled.check()
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from redis import Redis

from benchmarks.load import request
from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer, entries
from tests.scripted_redis import Proxy, close, read_command

STREAM: Final = "osiris.events"
FEEDBACK: Final = "phi3.feedback.submitted"
CREATED: Final = "phi3.proposal.created"
ASSESSED: Final = "phi3.proposal.assessed"
ROUND_TRIP: Final = 2.0
ERRORS: Final = {
    error.split()[0]: error
    for error in (
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "LOADING Redis is loading the dataset in memory",
        "READONLY You can't write against a read only replica.",
        "OOM command not allowed when used memory > 'maxmemory'.",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "CLUSTERDOWN The cluster is down",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "NOREPLICAS Not enough good replicas to write.",
        "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist.",
        "ERR max number of clients reached",
    )
}
TROUBLES: Final = ("slow", "stopped", "killed", *ERRORS)
RATE: Final = 50.0
"""Requests a second."""
A_PROPOSAL_OF: Final = 10
"""Requests of which one asks for a proposal; the others are feedback."""
RECOVERY_SECONDS: Final = 120.0
"""Within which the stream has every event after trouble: an outage ends up to 30 s late."""


_MOST_IDLE_SECONDS = 3.0
"""The server closes a connection that is idle for 5 s, and may do so just as a request is sent."""


class Answered(NamedTuple):
    """A request: the events that it made, when it was due, sent and answered, in seconds, and what
    is wrong with the answer."""

    events: list[tuple[str, str]]
    due: float
    sent: float
    answered: float
    failure: str | None


class Load:
    """Feedback and proposals at a steady rate, however long the answers take.

    Attributes:
        answers: in the order of their arrival.
    """

    def __init__(self, url: str) -> None:
        self.answers: list[Answered] = []
        self._address = urlsplit(url)
        self._numbers = itertools.count()
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, seconds: float) -> list[Answered]:
        """Sends requests for so long; returns their answers."""
        first, loop = len(self.answers), asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(round(seconds * RATE)):
                due = begin + number / RATE
                await asyncio.sleep(due - loop.time())
                group.create_task(self._request(next(self._numbers), due))
        while self._idle:
            *_, writer = self._idle.pop()
            await close(writer)
        return self.answers[first:]

    async def _request(self, number: int, due: float) -> None:
        proposal = number % A_PROPOSAL_OF == 0
        if proposal:
            path, body = "/propose_trade_adjustments/", {"prompt": "Long ABC from 100, now 112.5."}
        else:
            path = "/feedback/phi3/"
            body = {
                "transaction_id": str(number),
                "feedback_type": "rating",
                "feedback_content": "5",
            }
        loop = asyncio.get_running_loop()
        sent = loop.time()
        head, answer = await self._exchange(request("POST", path, json.dumps(body).encode()))
        answered = loop.time()
        failure = None
        if not head.startswith("HTTP/1.1 200") or "x-stored: false" in head.lower():
            failure = f"{head} {answer!r}"
        events = [(FEEDBACK, str(number))]
        if proposal and failure is None:
            transaction_id = json.loads(answer)["transaction_id"]
            events = [(CREATED, transaction_id), (ASSESSED, transaction_id)]
        self.answers.append(Answered(events, due, sent, answered, failure))

    async def _exchange(self, message: bytes) -> tuple[str, bytes]:
        """The head and the body of an answer."""
        reader, writer = await self._connection()
        writer.write(message)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = head.lower().partition("content-length:")[2].partition("\r\n")[0]
        body = await reader.readexactly(int(length))
        self._idle.append((asyncio.get_running_loop().time(), reader, writer))
        return head, body

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            since, reader, writer = self._idle.pop()
            age = asyncio.get_running_loop().time() - since
            if age < _MOST_IDLE_SECONDS and not reader.at_eof():
                return reader, writer
            await close(writer)
        return await asyncio.open_connection(self._address.hostname, self._address.port)


class TroubleProxy(Proxy):
    """A proxy whose delay is that of a long line: it holds bytes back and takes more meanwhile.

    Attributes:
        error: while set, the answer to XADD, to PUBLISH and to each command of a transaction.
    """

    error: str | None = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except ConnectionError:
            await close(writer)
            return
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        for work in (
            self._take(reader, writer, held),
            self._give(held, back),
            self._pump(there, writer, slow=False),
        ):
            pump = asyncio.create_task(work)
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _take(
        self,
        client: asyncio.StreamReader,
        answers: asyncio.StreamWriter,
        held: asyncio.Queue[tuple[float, bytes]],
    ) -> None:
        loop, refused = asyncio.get_running_loop(), None
        with contextlib.suppress(
            asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError
        ):
            while True:
                words = await read_command(client)
                name = words[0].upper()
                if name == "MULTI":
                    refused = self.error
                error = refused or (self.error if name in ("XADD", "PUBLISH") else None)
                if error is None:
                    held.put_nowait((loop.time() + self.delay, _encoded(words)))
                else:
                    answers.write(f"-{error}\r\n".encode())
                if name == "EXEC":
                    refused = None
        held.put_nowait((loop.time() + self.delay, b""))

    async def _give(
        self, held: asyncio.Queue[tuple[float, bytes]], server: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while True:
                due, data = await held.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    break
                server.write(data)
        await close(server)


def _encoded(words: list[str]) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)


class Troubled:
    """A sidecar whose Redis can be in trouble.

    Attributes:
        load: its requests.
    """

    def __init__(self, server: LiveServer, redis: RedisServer, proxy: TroubleProxy) -> None:
        self.load = Load(server.url)
        self._server = server
        self._redis = redis
        self._proxy = proxy

    @contextlib.asynccontextmanager
    async def trouble(self, kind: str) -> AsyncIterator[None]:
        """Redis is in trouble inside; `kind` is one of TROUBLES."""
        match kind:
            case "slow":
                self._proxy.delay = ROUND_TRIP
            case "stopped":
                self._redis.freeze()
            case "killed":
                self._redis.kill()
            case _:
                self._proxy.error = ERRORS[kind]
        try:
            yield
        finally:
            match kind:
                case "slow":
                    self._proxy.delay = 0.0
                case "stopped":
                    self._redis.thaw()
                case "killed":
                    self._redis.start()
                case _:
                    self._proxy.error = None

    async def events_waiting(self) -> int:
        """The number of events that Redis does not have yet."""
        health = await asyncio.to_thread(self._health)
        return int(health["database"]["journal"]["events"])

    async def recovered(self) -> None:
        """Returns when Redis has every event."""

        def has_all() -> bool:
            health = self._health()
            return bool(
                health["event_bus"]["connected"] and health["database"]["journal"]["events"] == 0
            )

        await asyncio.to_thread(self._server.wait_until, has_all, RECOVERY_SECONDS, 0.1)

    def _health(self) -> dict[str, Any]:
        health: dict[str, Any] = self._server.client.get("/health").json()
        return health

    def check(self) -> None:
        """Asserts that no request has failed, and that the stream has every event once, in the
        order in which the requests were answered."""
        answers = self.load.answers
        assert [answer.failure for answer in answers if answer.failure] == []
        answer_of = {event: answer for answer in answers for event in answer.events}
        with Redis(port=self._redis.port, decode_responses=True) as client:
            found = [_event(fields) for _, fields in entries(client, STREAM)]
        wanted, there = Counter(answer_of.keys()), Counter(found)
        assert wanted == there, f"lost: {wanted - there}, too many: {there - wanted}"
        latest_sent = 0.0
        for event in found:
            # An event comes into being between the request and its answer.
            assert answer_of[event].answered >= latest_sent
            latest_sent = max(latest_sent, answer_of[event].sent)
        position = {event: number for number, event in enumerate(found)}
        for kind, transaction_id in found:
            if kind == CREATED:
                assert position[kind, transaction_id] < position[ASSESSED, transaction_id]


def _event(fields: dict[str, str]) -> tuple[str, str]:
    data = json.loads(fields["data"])
    name = "proposal_transaction_id" if fields["type"] == ASSESSED else "transaction_id"
    return fields["type"], data[name]


@contextlib.asynccontextmanager
async def sidecar(folder: Path) -> AsyncIterator[Troubled]:
    """A sidecar, with models that answer at once, on a Redis that keeps what it confirms."""
    redis = RedisServer("--appendonly", "yes", "--appendfsync", "always", keep=True)
    redis.start()
    try:
        async with TroubleProxy(redis.port) as proxy:
            environ = {"REDIS_URL": proxy.url, "EVENT_STREAM_MAXLEN": "10000000"}
            with serve(folder, "--no-access-log", app="tests.quick_app:app", **environ) as server:
                troubled = Troubled(server, redis, proxy)
                await troubled.recovered()
                yield troubled
    finally:
        redis.remove()

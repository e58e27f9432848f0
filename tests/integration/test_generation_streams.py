"""Streams of generations over HTTP, for clients that read, stall or disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import ChoiceScores, Delta, GenerationRequest, Models
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.proposals import dumps
from osiris.llm_client import (
    Assessment,
    AsyncLLMClient,
    Done,
    LLMClientHTTPError,
    Proposal,
    Token,
)
from tests.in_process import Served, over_http
from tests.unit.fakes import PausedModel
from tests.unit.services.samples import PROPOSAL, SURE

STREAMS = 64
KIB = 1024


class Writer(FakeModel):
    """Writes a proposal or a critique of the ticker in the prompt, a few letters at a time, while
    other streams do the same."""

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        ticker = next(word for word in TICKERS if word in request.messages[-1]["content"])
        text = critique_of(ticker) if request.guidance is None else dumps(proposal_of(ticker))
        parts = [text[start : start + 12] for start in range(0, len(text), 12)]
        for number, part in enumerate(parts, 1):
            await asyncio.sleep(random.choice([0, 0, 0.001]))
            reason: Any = "stop" if number == len(parts) else None
            yield Delta(part, f"{ticker}/fake", completion_tokens=number, finish_reason=reason)

    async def score_choices(self, *_: object) -> ChoiceScores:
        return SURE


TICKERS = [f"T{number:02}X" for number in range(STREAMS)]


def proposal_of(ticker: str) -> dict[str, Any]:
    return PROPOSAL | {"ticker": ticker}


def critique_of(ticker: str) -> str:
    return f"The target of {ticker} is thin. Its stop is wide."


@pytest.fixture
async def writing(tmp_path: Path) -> AsyncIterator[Served]:
    async with over_http(tmp_path, Models(Writer(), Writer())) as served:
        yield served


async def test_of_64_streams_at_once_none_is_mixed_and_none_is_lost(writing: Served) -> None:
    async with AsyncLLMClient(writing.url, retries=0) as client:

        async def read(ticker: str) -> list[Any]:
            prompt = f"Long {ticker} from 100, now 112.5."
            return [event async for event in client.stream_propose_trade_adjustments(prompt)]

        streams = await asyncio.gather(*map(read, TICKERS))
    for ticker, events in zip(TICKERS, streams, strict=True):
        tokens = [event for event in events if isinstance(event, Token)]
        proposal, assessment, done = (event for event in events if not isinstance(event, Token))
        written = "".join(token.text for token in tokens if token.model == "phi3")
        judged = "".join(token.text for token in tokens if token.model == "hermes")
        assert written == dumps(proposal_of(ticker))
        assert judged == critique_of(ticker)
        assert proposal == Proposal(proposal_of(ticker))
        assert assessment == Assessment(critique_of(ticker), 0.75)
        assert isinstance(done, Done)
        assert done.answer["phi3_proposal"] == proposal_of(ticker)
        assert done.answer["hermes_assessment"] == critique_of(ticker)
        assert done.headers["X-Model"] == f"{ticker}/fake"
    assert len({events[-1].answer["transaction_id"] for events in streams}) == STREAMS


class Endless(FakeModel):
    """Writes for ever.

    Attributes:
        served: the server, once it runs.
        written: bytes of all text.
        unsent: maximum number of bytes in the send buffer of the server.
        closed: set once a generation has ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.served: Served | None = None
        self.written = self.unsent = 0
        self.closed = asyncio.Event()

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        assert self.served is not None
        try:
            while True:
                yield Delta("x" * KIB, "endless/fake")
                await asyncio.sleep(0)
                self.written += KIB
                waiting = [one.transport.unsent() for one in self.served.connections]
                self.unsent = max(self.unsent, *waiting)
        finally:
            self.closed.set()


@contextlib.asynccontextmanager
async def endless(folder: Path, **environ: str) -> AsyncIterator[tuple[Served, Endless]]:
    hermes = Endless()
    async with over_http(folder, Models(FakeModel(), hermes), **environ) as served:
        hermes.served = served
        yield served, hermes


async def test_a_client_that_reads_nothing_holds_little_memory_and_is_reset(tmp_path: Path) -> None:
    body = json.dumps({"prompt": "Write.", "max_length": 8192}).encode()
    request = (
        b"POST /generate/hermes/ HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    async with endless(tmp_path, SEND_TIMEOUT_SECONDS="0.5") as (served, hermes):
        with socket.socket() as client:
            # The kernel raises this to its minimum.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
            client.sendall(request + body)
            async with asyncio.timeout(20):
                await hermes.closed.wait()
    # uvicorn stops at 64 KiB, and then sixteen events wait. The rest is in the kernel's buffers.
    assert hermes.unsent < 66 * KIB
    assert hermes.written < 16 * KIB * KIB


@pytest.mark.parametrize("events", [1, 100])
async def test_closing_a_stream_stops_the_model(tmp_path: Path, events: int) -> None:
    async with endless(tmp_path) as (served, hermes), AsyncLLMClient(served.url) as client:
        async with aclosing(client.stream_generate("hermes", "Write.", 8192)) as stream:
            for _ in range(events):
                assert await anext(stream) == Token("x" * KIB, "hermes")
        async with asyncio.timeout(20):
            await hermes.closed.wait()


async def test_a_shutdown_ends_a_stream_with_its_own_error(tmp_path: Path) -> None:
    hermes = PausedModel("It", " is thin.")
    async with (
        over_http(tmp_path, Models(FakeModel(), hermes)) as served,
        AsyncLLMClient(served.url) as client,
    ):
        stream = client.stream_generate("hermes", "Judge.")
        assert await anext(stream) == Token("It", "hermes")
        served.shutdown.draining = True
        # The end of the grace period.
        await served.shutdown._cancel_running()
        with pytest.raises(LLMClientHTTPError, match="HTTP 503: The server is shutting") as caught:
            await anext(stream)
    assert caught.value.retry_after == 5.0
    assert hermes.closed == 1


async def test_a_connection_serves_another_request_after_a_stream(writing: Served) -> None:
    prompt = f"Long {TICKERS[0]} from 100."
    async with AsyncLLMClient(writing.url) as client:
        for _ in range(2):
            events = [event async for event in client.stream_generate("phi3", prompt)]
            assert isinstance(events[-1], Done)
        assert len(writing.connections) == 1

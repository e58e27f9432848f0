"""Proposals of other servers: SmolLM2 on llama.cpp's and on a sidecar, random weights on
`transformers serve`.

REMOTE_PROPOSALS is the number of proposals of each server, 20 by default.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from pydantic import SecretStr

from benchmarks.throughput import transformers_serve
from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.llama_server import LlamaServer, Options
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.base import ChoiceScores
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.models.remote.regex import schema_regex
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.propose import Proposer
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.metrics import MetricsSink
from llm_sidecar.text import find_fault
from osiris.server import create_app
from tests.demo_cases import cases
from tests.real_weights import smollm2_gguf
from tests.unit.fakes import last_of

PROPOSALS: Final = int(os.environ.get("REMOTE_PROPOSALS", "20"))
PATIENT: Final = ModelLimits(queue_length=300, request_timeout=3000.0)
INVALID: Final = (
    "phi3 did not write a valid proposal, so nothing is returned; check the model with another "
    "prompt."
)


async def outcomes(model: RemoteModel, at_once: int = PROPOSALS) -> collections.Counter[str]:
    """The numbers of valid proposals and of each error.

    Args:
        model: writes `PROPOSALS` of them.
        at_once: how many at the same time.
    """
    proposer = Proposer(model, tuple, MetricsSink(), temperature=0.0, retry=False)
    turn = asyncio.Semaphore(at_once)

    async def propose(context: str) -> str:
        try:
            async with turn:
                proposed = await last_of(
                    proposer.generate(context, 248, Deadline.after(3000.0)), Proposed
                )
        except ModelUnavailable as error:
            return error.detail
        written = proposals.dumps(proposals.in_order(proposed.proposal))
        assert re.fullmatch(schema_regex(proposals.GUIDANCE), written)
        return "valid"

    # The sidecar refuses text with control characters, before it asks a model.
    texts = [case.prompt for case in cases(2 * PROPOSALS) if find_fault(case.prompt) is None]
    contexts = texts[:PROPOSALS]
    return collections.Counter(await asyncio.gather(*map(propose, contexts)))


async def score(model: RemoteModel) -> ChoiceScores:
    messages = hermes_plugin.score_messages({"ticker": "AAPL", "action": "pass"}, "Long AAPL.")
    return await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)


@contextlib.asynccontextmanager
async def closing(model: RemoteModel) -> AsyncIterator[RemoteModel]:
    try:
        yield model
    finally:
        await model.close()


@pytest.fixture
def llama() -> Iterator[LlamaServer]:
    options = Options(
        model=str(smollm2_gguf()),
        context=16_384,
        slots=4,
        threads=2,
        batch=256,
        cache_mib=256,
        layers_on_gpu=0,
    )
    server = LlamaServer.start(options, program=None)
    yield server
    server.close()


async def test_every_proposal_of_llama_cpps_server_is_valid(llama: LlamaServer) -> None:
    url, key = SecretStr(f"http://127.0.0.1:{llama._port}/v1"), SecretStr(llama._key)
    async with closing(RemoteModel("phi3", [url], key=key, limits=PATIENT)) as model:
        assert await outcomes(model) == {"valid": PROPOSALS}
        (server,) = model.status().servers
        assert (server.schema, server.scores) == ("grammar", "logprobs")
        assert 0.5 < (await score(model)).mass < 1.0


async def test_every_proposal_of_another_sidecar_is_valid(tmp_path: Path) -> None:
    weights = str(smollm2_gguf())
    limits = {"REQUEST_TIMEOUT_SECONDS": "3000", "QUEUE_LENGTH": str(PATIENT.queue_length)}
    environ = {"MICRO_LLM_MODEL_PATH": weights, **limits}
    usual = {"LANCEDB_URI": str(tmp_path), "REDIS_URL": "memory://", "TTS_VOICE": "espeak"}
    app = create_app(Settings.from_environ(environ | usual))
    transport = httpx.ASGITransport(app=app)
    url = SecretStr("http://sidecar/v1")
    async with (
        app.router.lifespan_context(app),
        closing(RemoteModel("phi3", [url], limits=PATIENT, transport=transport)) as model,
    ):
        assert await outcomes(model) == {"valid": PROPOSALS}
        (server,) = model.status().servers
        assert (server.schema, server.scores) == ("json_schema", "logprobs")
        assert 0.5 < (await score(model)).mass < 1.0


async def test_transformers_serve_takes_no_schema_so_random_weights_write_no_proposal(
    random_hermes_torch: Path, tmp_path: Path
) -> None:
    with transformers_serve(random_hermes_torch, tmp_path) as url:
        servers = [SecretStr(f"{url}/v1")]
        made = RemoteModel("phi3", servers, model=str(random_hermes_torch), limits=PATIENT)
        async with closing(made) as model:
            assert await outcomes(model, at_once=4) == {INVALID: PROPOSALS}
            (server,) = model.status().servers
            assert (server.schema, server.scores) == ("prompt", "text")
            assert (await score(model)).mass < 0.001

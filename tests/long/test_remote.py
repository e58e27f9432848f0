"""A real language model behind other servers: llama.cpp's, and `transformers serve`."""

from __future__ import annotations

import asyncio
import collections
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from benchmarks.throughput import transformers_serve
from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines.llama_server import LlamaServer, Options
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.remote.model import RemoteModel
from llm_sidecar.models.remote.regex import schema_regex
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.propose import Proposer
from llm_sidecar.telemetry.metrics import MetricsSink
from tests.demo_cases import cases
from tests.real_transformers import smollm2_folder
from tests.real_weights import smollm2_gguf
from tests.unit.fakes import last_of

PROPOSALS = 200
PATIENT = ModelLimits(queue_length=300, request_timeout=3000.0)


async def outcomes(model: RemoteModel, count: int) -> collections.Counter[str]:
    """The numbers of valid proposals and of each error."""
    proposer = Proposer(model, tuple, MetricsSink(), temperature=0.0, timeout=3000.0, retry=False)

    async def propose(context: str) -> str:
        try:
            proposed = await last_of(proposer.generate(context, 248), Proposed)
        except ModelUnavailable as error:
            return error.detail
        written = proposals.dumps(proposals.in_order(proposed.proposal))
        assert re.fullmatch(schema_regex(proposals.GUIDANCE), written)
        return "valid"

    contexts = [case.prompt for case in cases(count)]
    found = collections.Counter(await asyncio.gather(*map(propose, contexts)))
    print(model.status().servers, found)
    return found


@pytest.fixture(scope="module")
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
    model = RemoteModel("phi3", [url], key=key, limits=PATIENT)
    assert await outcomes(model, PROPOSALS) == {"valid": PROPOSALS}
    messages = hermes_plugin.score_messages({"ticker": "AAPL", "action": "pass"}, "Long AAPL.")
    scores = await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    print(scores)
    assert 0.0 < scores.mass < 1.0
    await model.close()


async def test_transformers_serve_gives_a_valid_proposal_or_an_error(tmp_path: Path) -> None:
    folder = smollm2_folder()
    with transformers_serve(folder, tmp_path) as url:
        model = RemoteModel("phi3", [SecretStr(f"{url}/v1")], model=str(folder), limits=PATIENT)
        found = await outcomes(model, 20)
        (server,) = model.status().servers
        assert (server.schema, server.scores) == ("prompt", "text")
        invalid = "phi3 did not write a valid proposal, so nothing is returned; check the model"
        assert all(what == "valid" or what.startswith(invalid) for what in found)
        await model.close()

"""A real language model in a GGUF file: SmolLM2-135M-Instruct on llama.cpp."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.models.files import locate_phi3
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.settings import Settings
from tests.completions import complete
from tests.demo_cases import cases
from tests.live_server import ROOT
from tests.real_weights import smollm2_gguf


@pytest.fixture
async def model() -> AsyncIterator[LocalModel]:
    settings = Settings(models={"phi3_path": smollm2_gguf()})
    loaded = LocalModel(
        "phi3",
        lambda: locate_phi3(settings),
        limits=ModelLimits(queue_length=200, request_timeout=1500.0),
    )
    yield loaded
    await loaded.close()


async def test_a_hundred_proposals_are_valid(model: LocalModel) -> None:
    async def propose(context: str) -> str:
        messages = proposals.build_messages(context)
        request = GenerationRequest(messages, proposals.MAX_COMPLETION_TOKENS, proposals.GUIDANCE)
        return (await complete(model, request)).text

    contexts = [case.prompt for case in cases(100)]
    texts = await asyncio.gather(*map(propose, contexts))
    parsed = list(map(proposals.parse, texts))
    copied = sum(p["ticker"] in context for p, context in zip(parsed, contexts, strict=True))
    print(f"{copied} of {len(parsed)} valid proposals name a ticker of their prompt")
    assert len(parsed) == 100


async def test_the_readme_quotes_its_critique(model: LocalModel) -> None:
    readme = (ROOT / "README.md").read_text()
    answer = re.search(r"```json\n(\{\n  \"transaction_id.*?)```", readme, re.DOTALL)
    prompt = re.search(r"""'\{"prompt": "(Long AAPL[^"]*)"\}'""", readme)
    said = re.search(r'it says of the proposal below: "(.*?) …"', readme)
    assert answer is not None
    assert prompt is not None
    assert said is not None
    proposal = json.loads(answer[1])["phi3_proposal"]
    messages = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, proposal, prompt[1])
    completion = await complete(model, GenerationRequest(messages, 40))
    assert completion.text.startswith(said[1])


async def test_it_knows_the_language(model: LocalModel) -> None:
    question = [{"role": "user", "content": "Which language do people speak in France? One word."}]
    assert "French" in (await complete(model, GenerationRequest(question, 8))).text


async def test_a_score_has_a_probability_for_each_answer(model: LocalModel) -> None:
    proposal = {"ticker": "AAPL", "action": "pass", "confidence": 0.6, "rationale": "Wait."}
    messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, proposal, "Long AAPL.")
    scores = await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    assert len(scores.probabilities) == 11
    assert all(0.0 < share < 1.0 for share in scores.probabilities.values())
    assert scores.mass < 1.0


async def test_a_prompt_has_the_log_probabilities_of_the_completion_that_wrote_it(
    model: LocalModel,
) -> None:
    asked = GenerationRequest([], 0, text="The capital of France is", prompt_logprobs=0)
    prompt = (await complete(model, asked)).prompt_logprobs
    written = (await complete(model, replace(asked, max_tokens=40, logprobs=0))).logprobs
    tokens = [token.id for token in (*prompt, *written)]
    again = GenerationRequest([], 0, tokens=tokens, prompt_logprobs=0)
    found = (await complete(model, again)).prompt_logprobs[len(prompt) :]
    assert written[0].data == b" Paris"
    assert [token.logprob for token in found] == pytest.approx(
        [token.logprob for token in written], abs=1e-4
    )

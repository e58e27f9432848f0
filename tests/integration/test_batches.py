"""Batches on torch and on plain onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Phi3Config

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Engine, GenerationRequest, Message, load_engine
from llm_sidecar.engines.base import Batch, Delta, Sampling, unless_failed
from llm_sidecar.engines.batch import MAX_ROWS
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.onnx import OnnxEngine
from llm_sidecar.engines.ort import OrtEngine
from llm_sidecar.engines.text_decoder import TextDecoder
from llm_sidecar.engines.token_bytes import TokenBytes
from llm_sidecar.engines.torch import TorchEngine
from llm_sidecar.engines.torch_states import batch_capacity, empty_cache
from llm_sidecar.errors import InvalidRequest
from tests.live_server import ROOT
from tests.random_models import convert_to_onnx, write_onnx_adapter, write_transformers_folder

AnyEngine = TorchEngine | OrtEngine


def load(folder: Path) -> AnyEngine:
    engine = load_engine(folder, device="cpu")
    assert isinstance(engine, TorchEngine | OrtEngine)
    return engine


@pytest.fixture(scope="module", params=["random_hermes_torch", "random_hermes_onnx"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> AnyEngine:
    return load(folder)


@pytest.fixture(scope="module")
def torch_engine(random_hermes_torch: Path) -> TorchEngine:
    return TorchEngine(random_hermes_torch, device="cpu")


@pytest.fixture(scope="module")
def ort_engine(random_hermes_onnx: Path) -> OrtEngine:
    return OrtEngine(random_hermes_onnx)


@pytest.fixture(scope="module")
def long_phi3_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-3 with other rotary embeddings beyond 4,096 tokens."""
    return write_transformers_folder(
        tmp_path_factory.mktemp("long-torch"), original_context_length=4096
    )


@pytest.fixture(scope="module")
def long_phi3_onnx(long_phi3_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_to_onnx(long_phi3_torch, tmp_path_factory.mktemp("long-onnx"), "fp32")


def request(text: str, tokens: int = 12, **settings: Any) -> GenerationRequest:
    return GenerationRequest([Message(role="user", content=text)], tokens, **settings)


def alone(engine: Engine, one: GenerationRequest) -> tuple[str, int, str | None]:
    deltas = list(engine.stream(one))
    last = deltas[-1]
    return "".join(d.text for d in deltas), last.completion_tokens, last.finish_reason


class Written:
    """The text of a batch's requests so far, by number."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.text: dict[int, str] = {}
        self.ended: dict[int, tuple[str, int, str | None]] = {}

    def step(self) -> list[tuple[int, Delta]]:
        deltas = [(number, unless_failed(result)) for number, result in self.batch.step()]
        for number, delta in deltas:
            self.text[number] = self.text.get(number, "") + delta.text
            if delta.finish_reason is not None:
                self.ended[number] = (
                    self.text[number],
                    delta.completion_tokens,
                    delta.finish_reason,
                )

        return deltas

    def to_the_end(self) -> None:
        while self.batch:
            self.step()


def test_answers_are_those_that_each_request_gets_alone(engine: AnyEngine) -> None:
    requests = [
        request("Long ABC from 100.", 20),
        request("?", 5),
        request("Kurz: QX. " * 60, 9),
        request("Short XYZ", 1),
        request("Short XYZ again, and again", 30, temperature=0.7, seed=5),
        request("Long ABC from 100.", 20),
    ]
    expected = [alone(engine, one) for one in requests]
    written = Written(engine.batch())
    for number, one in enumerate(requests):
        written.batch.add(number, one)
        # Each joins while the others write.
        written.step()
        written.step()
    written.to_the_end()
    assert [written.ended[number] for number in range(len(requests))] == expected
    assert len(written.batch) == 0


def test_one_that_stays_behind_and_one_that_follows_go_on(engine: AnyEngine) -> None:
    first, second, third = request("Long ABC", 40), request("Short QX", 6), request("Long Z", 9)
    expected = [alone(engine, one) for one in (first, second, third)]
    written = Written(engine.batch())
    written.batch.add(1, first)
    written.batch.add(2, second)
    while 2 not in written.ended:
        written.step()
    written.step()
    written.batch.add(3, third)
    written.to_the_end()
    assert [written.ended[number] for number in (1, 2, 3)] == expected


def test_a_request_that_is_given_up_leaves_the_others_alone(engine: AnyEngine) -> None:
    first, second = request("Long ABC", 30), request("Short QX", 30)
    expected = alone(engine, second)
    written = Written(engine.batch())
    written.batch.add(1, first)
    written.batch.add(2, second)
    for _ in range(5):
        written.step()
    written.batch.remove(1)
    written.to_the_end()
    assert written.ended == {2: expected}


def test_what_was_read_in_a_batch_is_not_read_again(engine: AnyEngine, folder: Path) -> None:
    one, other = request("Long ABC from 100, now 112.5.", 10), request("Short QX from 30.", 10)
    expected = alone(engine, one)
    fresh = load(folder)
    written = Written(fresh.batch())
    written.batch.add(1, one)
    written.batch.add(2, other)
    written.to_the_end()
    *_, last = fresh.stream(one)
    assert last.prompt_tokens - 3 <= last.cached_tokens <= last.prompt_tokens - 2
    assert alone(fresh, one) == expected


def test_a_prompt_that_does_not_fit_is_refused_and_the_others_go_on(engine: AnyEngine) -> None:
    batch = engine.batch()
    batch.add(1, request("Long ABC", 5))
    with pytest.raises(InvalidRequest):
        batch.add(2, request("Long ABC", 9000))
    written = Written(batch)
    written.to_the_end()
    assert list(written.ended) == [1]


def test_a_failure_ends_all_and_leaves_the_engine_fit(
    engine: AnyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(engine, request("Long ABC", 5))
    batch = engine.batch()
    for number in (1, 2):
        batch.add(number, request("Long ABC", 5))
    batch.step()
    with monkeypatch.context() as patched:
        model, run = (
            (engine.model, "forward") if isinstance(engine, TorchEngine) else (engine._model, "run")
        )
        patched.setattr(model, run, lambda *_, **arguments: torch.zeros(0)[1])
        with pytest.raises(IndexError):
            while batch:
                batch.step()
    assert len(batch) == 0
    assert alone(engine, request("Long ABC", 5)) == expected


def test_states_grow_in_place_and_are_those_of_the_usual_cache(torch_engine: TorchEngine) -> None:
    growing, usual = (
        empty_cache(torch_engine.model.config),
        DynamicCache(config=torch_engine.model.config),
    )
    ids = torch.randint(5, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    logits = []
    with torch.inference_mode():
        for cache in (growing, usual):
            torch_engine.model(input_ids=ids[:, :280], past_key_values=cache)
            cache.crop(-30)
            out = torch_engine.model(input_ids=ids[:, 250:], past_key_values=cache)
            logits.append(out.logits)
    assert torch.equal(*logits)
    before = growing.layers[0].keys.data_ptr()
    with torch.inference_mode():
        torch_engine.model(input_ids=ids[:, :1], past_key_values=growing)
    assert growing.layers[0].keys.data_ptr() == before


def test_what_all_begin_with_is_read_once(ort_engine: OrtEngine) -> None:
    prompts = [f"{'The same beginning of all. ' * 8}Long {name}" for name in ("ABC", "QX", "Z")]
    written = Written(ort_engine.batch())
    cached: dict[int, int] = {}
    for number, prompt in enumerate(prompts):
        written.batch.add(number, request(prompt, 4))
    while written.batch:
        for number, delta in written.step():
            cached[number] = delta.cached_tokens
    assert cached[0] < 10
    assert min(cached[1], cached[2]) > 30


def test_states_take_as_much_memory_as_they_need(ort_engine: OrtEngine) -> None:
    long = request("Long ABC. " * 100, 40)
    *_, last = ort_engine.stream(long)
    assert last.prompt_tokens > 300
    expected = alone(ort_engine, long)
    written = Written(ort_engine.batch())
    written.batch.add(1, request("Short QX", 30))
    written.batch.add(2, request("Short Z", 30))
    for _ in range(6):
        written.step()
    # More rows, and a longer one, than there was memory for.
    written.batch.add(3, long)
    written.to_the_end()
    assert written.ended[3] == expected


def test_rows_for_which_there_is_no_memory_wait_their_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(folder)
    # The second is still being read when the third begins to write.
    prompts = ("Long ABC", "Long Q. " * 80, "Long XY", "Long ZZZZ")
    requests = [request(prompt, 20 + number) for number, prompt in enumerate(prompts)]
    expected = [alone(engine, one) for one in requests]
    longest = max(next(engine.stream(one)).prompt_tokens + one.max_tokens for one in requests)
    # Memory for two of them.
    monkeypatch.setattr(engine, "context_length", longest)
    join = engine.join
    joined: list[set[int]] = []

    def noting(states: Any, size: int, former: Any) -> Any:
        joined.append(set(states))
        return join(states, size, former)

    monkeypatch.setattr(engine, "join", noting)
    written = Written(engine.batch())
    for number, one in enumerate(requests):
        written.batch.add(number, one)
    while written.batch:
        count = len(written.batch)
        assert len(written.step()) == count
    assert [written.ended[number] for number in range(len(requests))] == expected
    # The short ones take less.
    assert {0, 2, 3} in joined
    assert all(len(numbers) <= 2 for numbers in joined if 1 in numbers)


def test_both_onnx_engines_agree(ort_engine: OrtEngine, random_hermes_onnx: Path) -> None:
    other = OnnxEngine(random_hermes_onnx, device="cpu")
    assert other.runtime == "onnxruntime-genai"
    proposal = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "None."}
    critique, task = (
        hermes_plugin.build_messages(task, proposal, "Long ABC.")
        for task in (hermes_plugin.CRITIQUE_TASK, hermes_plugin.SCORE_TASK)
    )
    one = GenerationRequest(critique, 30)
    assert alone(ort_engine, one)[0] == alone(other, one)[0]
    found, expected = (
        engine.score_choices(task, hermes_plugin.SCORE_ANSWERS) for engine in (ort_engine, other)
    )
    assert found == pytest.approx(expected, abs=1e-6)
    tokens, probabilities = ort_engine.next_token(critique)
    its_tokens, its_probabilities = other.next_token(critique)
    assert tokens == its_tokens
    np.testing.assert_allclose(probabilities, its_probabilities, atol=1e-6)


def test_a_graph_with_a_pruned_head_answers_as_the_whole_one(
    random_phi3_onnx: Path, pruned_phi3_onnx: Path
) -> None:
    whole, pruned = load(random_phi3_onnx), load(pruned_phi3_onnx)
    assert isinstance(pruned, OrtEngine)
    shapes = [engine.model.get_outputs()[0].shape[1] for engine in (whole, pruned)]
    assert shapes == ["sequence_length", 1]
    messages = proposals.build_messages("Long ABC from 100.")
    one = GenerationRequest(messages, 256, proposals.GUIDANCE)
    assert alone(pruned, one) == alone(whole, one)
    found, expected = (
        engine.score_choices(messages, hermes_plugin.SCORE_ANSWERS) for engine in (pruned, whole)
    )
    assert found == pytest.approx(expected, rel=0, abs=1e-6)
    # As onnxruntime-genai runs it.
    other = OnnxEngine(pruned_phi3_onnx, device="cpu")
    assert alone(other, one) == alone(whole, one)
    its = other.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    assert its == pytest.approx(expected, rel=0, abs=1e-6)


def test_a_worker_on_a_cpu_loads_one_runtime(random_phi3_onnx: Path) -> None:
    code = (
        "import pathlib, sys; from llm_sidecar.engines import load_engine; "
        "load_engine(pathlib.Path(sys.argv[1]), device='cpu'); "
        "sys.exit(not {'onnxruntime_genai', 'torch', 'transformers'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, str(random_phi3_onnx)], cwd=ROOT, check=True)


def test_a_phi3_of_long_context_runs_on_onnxruntime_genai(long_phi3_onnx: Path) -> None:
    assert load_engine(long_phi3_onnx, device="cpu").runtime == "onnxruntime-genai"


def test_a_long_prompt_is_computed_with_the_rotary_embeddings_of_long_context(
    long_phi3_onnx: Path, long_phi3_torch: Path
) -> None:
    engine = load_engine(long_phi3_onnx, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(long_phi3_torch, dtype=torch.float32)
    short, long = "Long ABC. " * 30, "Long ABC. " * 800
    for text in (short, long, short):
        tokens, probabilities = engine.next_token(request(text).messages)
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, -1]
        np.testing.assert_allclose(probabilities, torch.softmax(logits, -1), atol=1e-4)
    assert len(engine.tokenize(request(long))) > 4096 + 256


def test_bytes_that_are_no_text_end_nothing() -> None:
    pieces = ["a", "<0x53>", "<0xD8>", "<0xC1>", "\u2581"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = [0, 1, 2, 3, 4, 0, 4, 0]
    generation = Generation(
        request("", len(tokens)),
        [0],
        decode=TextDecoder(tokenizer),
        data=TokenBytes(tokenizer),
        ends=frozenset(),
        sampling=Sampling(),
    )
    certain = np.eye(len(pieces), dtype=np.float32)
    deltas = [generation.sample(certain[token]) for token in tokens]
    assert deltas[-1].completion_tokens == len(tokens)
    assert "".join(delta.text for delta in deltas).endswith("a a")


def test_models_whose_rows_depend_on_each_other_get_no_batches() -> None:
    assert batch_capacity(LlamaConfig()) == MAX_ROWS
    assert batch_capacity(MistralConfig(sliding_window=64)) == 1
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    scaled = Phi3Config(rope_parameters={**factors, "rope_theta": 1e4}, sliding_window=None)
    assert batch_capacity(scaled) == 1


@pytest.fixture(params=["random_phi3_torch", "random_phi3_onnx"])
def phi3(request: pytest.FixtureRequest) -> AnyEngine:
    return load(request.getfixturevalue(request.param))


def test_proposals_of_a_batch_are_valid(phi3: AnyEngine) -> None:
    written = Written(phi3.batch())
    for number in range(3):
        prompt = proposals.build_messages(f"Long ABC, {number}")
        guided = GenerationRequest(prompt, 256, proposals.GUIDANCE, temperature=1.0, seed=number)
        written.batch.add(number, guided)
    written.to_the_end()
    for text, _, reason in written.ended.values():
        assert reason == "stop"
        proposals.parse(text)
        json.loads(text)


def test_guided_rows_beside_free_ones_get_what_they_get_alone(phi3: AnyEngine) -> None:
    requests = [
        GenerationRequest(proposals.build_messages("Long ABC"), 256, proposals.GUIDANCE),
        request("Long ABC from 100.", 30),
        GenerationRequest(proposals.build_messages("Short QX"), 256, proposals.GUIDANCE),
    ]
    expected = [alone(phi3, one) for one in requests]
    written = Written(phi3.batch())
    for number, one in enumerate(requests):
        written.batch.add(number, one)
        written.step()
        written.step()
    written.to_the_end()
    assert [written.ended[number] for number in range(len(requests))] == expected


class Sampled:
    """The logits that each completion of an engine is sampled from, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def of(self, engine: Engine, requests: list[GenerationRequest]) -> list[list[Logits]]:
        """The logits of requests that join one batch, each two steps after the last."""
        found: dict[int, list[Logits]] = {}
        started: list[Generation] = []
        start, sample = OrtEngine.start, Generation.sample

        def noting(decoder: OrtEngine, one: GenerationRequest) -> Generation:
            started.append(start(decoder, one))
            return started[-1]

        def sampling(generation: Generation, logits: Logits) -> Delta:
            found.setdefault(id(generation), []).append(logits.copy())
            return sample(generation, logits)

        with self._monkeypatch.context() as patched:
            patched.setattr(OrtEngine, "start", noting)
            patched.setattr(Generation, "sample", sampling)
            written = Written(engine.batch())
            for number, one in enumerate(requests):
                written.batch.add(number, one)
                written.step()
                written.step()
            written.to_the_end()
        return [found[id(generation)] for generation in started]


@pytest.mark.parametrize(
    ("model", "adapted"),
    [("random_phi3_onnx", False), ("random_phi3_onnx", True), ("pruned_phi3_onnx", False)],
)
def test_a_row_of_a_batch_is_computed_as_alone_to_the_last_bit(
    model: str,
    adapted: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder: Path = request.getfixturevalue(model)
    adapter = write_onnx_adapter(folder, tmp_path / "20260101") if adapted else None
    engine = OrtEngine(folder, adapter=adapter)
    requests = [
        GenerationRequest(
            proposals.build_messages(f"Long {ticker} from 100, now {112 + number}."),
            256,
            proposals.GUIDANCE,
            temperature=0.9 * (number % 2),
            seed=number,
        )
        for number, ticker in enumerate(("ABC", "QX", "BRK.B", "MSFT", "X"))
    ]
    requests.append(GenerationRequest([Message(role="user", content="Long ABC from 100.")], 20))
    sampled = Sampled(monkeypatch)
    alone = [sampled.of(engine, [one])[0] for one in requests]
    together = sampled.of(engine, requests)
    assert list(map(len, together)) == list(map(len, alone))
    for ours, theirs in zip(together, alone, strict=True):
        assert all(map(np.array_equal, ours, theirs))

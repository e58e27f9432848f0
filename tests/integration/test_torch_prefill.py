"""Prefill on torch in bfloat16 for a model on onnxruntime."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Engine, EngineOptions, GenerationRequest, Message, load_engine
from llm_sidecar.engines.base import Delta
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.ort import OrtEngine
from llm_sidecar.engines.ort_model import States
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.local.identity import load_identified
from llm_sidecar.models.local.protocol import Load
from tests.conftest import made_once
from tests.random_models import convert_to_onnx, write_onnx_adapter, write_transformers_folder


@pytest.fixture(scope="module")
def folder(random_hermes_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on onnxruntime, with a pruned head, and a link to its transformers folder."""

    def make(folder: Path) -> None:
        convert_to_onnx(random_hermes_torch, folder, "fp32", ["prune_lm_head=true"])
        (folder / "transformers").symlink_to(random_hermes_torch)

    return made_once(tmp_path_factory, "handed-over", make)


def load(folder: Path) -> OrtEngine:
    engine = load_engine(folder, device="cpu", prefill_dtype="bfloat16")
    assert isinstance(engine, OrtEngine)
    return engine


@pytest.fixture(scope="module")
def used(folder: Path) -> OrtEngine:
    return load(folder)


def chat(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def logits_of(engine: OrtEngine, text: str) -> tuple[int, Logits]:
    """The number of tokens of a prompt, and the logits after it."""
    prompt = engine.tokenize(GenerationRequest(chat(text), 1))
    return len(prompt), engine._logits_after(prompt)[0]


def test_the_states_of_a_prompt_are_those_of_torch_but_for_the_last_two_tokens(
    used: OrtEngine, folder: Path
) -> None:
    assert used.prefill_folder == folder / "transformers"
    assert used.dtype == "bfloat16"
    prompt = used.tokenize(GenerationRequest(chat("Long ABC. " * 80), 1))
    assert len(prompt) > 2 * PREFILL_CHUNK
    with used.borrow(prompt, len(prompt)) as prefix:
        *_, logits = used._process(prefix, prompt)
        found = prefix.states
        assert found.handed_over == len(prompt) - 2
        assert found.lengths == [len(prompt)]
    plain = load_engine(folder, device="cpu")
    assert isinstance(plain, OrtEngine)
    assert plain.prefill_folder is None
    expected = States(plain._model, 1, len(prompt))
    its_logits = plain.forward(prompt, expected)
    for ours, theirs in zip(found.arrays, expected.arrays, strict=True):
        ours, theirs = (array[0, :, : len(prompt)] for array in (ours, theirs))
        # Each number of bfloat16 ends in 16 zero bits.
        assert not (ours[:, :-2].view(np.uint32) & 0xFFFF).any()
        assert (ours[:, -2:].view(np.uint32) & 0xFFFF).any()
        assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    assert logits is not None
    assert not np.array_equal(logits, its_logits)


def texts() -> Iterator[str]:
    """Prompts that begin alike: some end in the same block, some exactly at the end of one."""
    yield "Long ABC. " * 60
    yield "Long ABC. " * 60 + "Now?"
    yield "Long ABC. " * 90
    yield "Long ABC. " * 24 + "Short Q. " * 80
    yield "Long ABC. " * 60
    yield "?"
    yield from ("Long ABC. " * 20 + "?" * number for number in range(0, 2 * PREFILL_CHUNK, 61))


def test_earlier_prompts_change_no_bit(used: OrtEngine, folder: Path) -> None:
    lengths = set()
    for text in texts():
        length, found = logits_of(used, text)
        lengths.add(length)
        fresh = OrtEngine(folder)
        assert used._prefill is not None
        assert fresh.hand_over(used._prefill, folder) is None
        assert np.array_equal(found, logits_of(fresh, text)[1])
    assert min(lengths) < PREFILL_CHUNK < max(lengths)


def test_a_prompt_may_end_anywhere_in_a_block(used: OrtEngine, folder: Path) -> None:
    assert used._prefill is not None
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, 3 * PREFILL_CHUNK).tolist()
    # Longer and shorter than the prompt before, up to just before and after the end of a block.
    around = [PREFILL_CHUNK + more for more in range(-1, 5)]
    for count in (1, 2, 3, *around, 2 * PREFILL_CHUNK + 2, 600, *reversed(around), 3, 2, 1):
        prompt = tokens[:count]
        fresh = OrtEngine(folder)
        assert fresh.hand_over(used._prefill, folder) is None
        expected = fresh._logits_after(prompt)
        for _ in range(2):
            assert np.array_equal(used._logits_after(prompt), expected)


class Sampled:
    """The logits that each completion of an engine is sampled from, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def of(self, engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[Logits]]:
        """The logits of requests that join one batch, each two steps after the last."""
        found: dict[int, list[Logits]] = {}
        sample = Generation.sample

        def sampling(generation: Generation, logits: Logits) -> Delta:
            found.setdefault(id(generation), []).append(logits.copy())
            return sample(generation, logits)

        with self._monkeypatch.context() as patched:
            patched.setattr(Generation, "sample", sampling)
            batch = engine.batch()
            for number, one in enumerate(requests):
                batch.add(number, one)
            kept = [row.generation for row in batch._rows.values()]  # type: ignore[attr-defined]
            while batch:
                batch.step()
        return [found[id(generation)] for generation in kept]


def test_a_row_of_a_batch_is_computed_as_alone_to_the_last_bit(
    used: OrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        GenerationRequest(proposals.build_messages(f"Long {name}"), 64, proposals.GUIDANCE)
        for name in ("ABC", "QX", "BRK.B")
    ]
    requests.append(GenerationRequest(chat("Long ABC from 100."), 9))
    sampled = Sampled(monkeypatch)
    together = sampled.of(used, requests)
    for one, found in zip(requests, together, strict=True):
        (alone,) = sampled.of(used, [one])
        assert len(found) == len(alone)
        assert all(map(np.array_equal, found, alone))


def test_a_prompt_can_be_cancelled_after_each_block(used: OrtEngine) -> None:
    request = GenerationRequest(chat("Short XYZ from 80. " * 60), 3)
    prompt = used.tokenize(request)
    deltas = list(used.stream(request))
    blocks = -(-(len(prompt) - 2) // PREFILL_CHUNK)
    assert [delta.completion_tokens for delta in deltas] == [*[0] * blocks, 1, 2, 3]
    # The blocks of the cancelled request are not prefilled again.
    steps = used.stream(GenerationRequest(chat("Flat QX at 5. " * 60), 3))
    next(steps)
    next(steps)
    steps.close()
    *_, last = used.stream(GenerationRequest(chat("Flat QX at 5. " * 60), 3))
    assert last.cached_tokens == 2 * PREFILL_CHUNK


def test_a_prepared_prefix_is_not_prefilled_again(used: OrtEngine) -> None:
    system = Message(role="system", content="You are the desk. " * 40)
    for _ in used.prefill(GenerationRequest([system], 50)):
        pass
    prepared = len(used.tokenize(GenerationRequest([system], 50), header=False))
    *_, last = used.stream(GenerationRequest([system, *chat("Long ABC.")], 3))
    assert last.cached_tokens == (prepared - 2) // PREFILL_CHUNK * PREFILL_CHUNK


def test_scores_are_close_to_those_of_onnxruntime_alone(used: OrtEngine, folder: Path) -> None:
    plain = load_engine(folder, device="cpu")
    proposal = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "None."}
    messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, proposal, "Long ABC.")
    found, expected = (
        engine.score_choices(messages, hermes_plugin.SCORE_ANSWERS) for engine in (used, plain)
    )
    assert found != expected
    assert found == pytest.approx(expected, abs=0.02)
    assert used.score_choices(messages, hermes_plugin.SCORE_ANSWERS) == found


def test_the_identity_names_what_does_the_prefill(folder: Path) -> None:
    _, plain, _ = load_identified(Load(str(folder), EngineOptions("cpu")))
    _, handed_over, _ = load_identified(
        Load(str(folder), EngineOptions("cpu", prefill_dtype="bfloat16"))
    )
    assert (plain.dtype, plain.prefill_files) == (None, None)
    assert handed_over.dtype == "bfloat16"
    assert handed_over.prefill_files is not None
    assert (plain.model_files, plain.runtime) == (handed_over.model_files, handed_over.runtime)
    assert "torch" in handed_over.versions


def test_an_adapter_switches_prefill_on_torch_off(folder: Path, tmp_path: Path) -> None:
    adapter = write_onnx_adapter(folder, tmp_path / "20260101")
    engine = load_engine(folder, device="cpu", adapter=adapter, prefill_dtype="bfloat16")
    assert engine.prefill_folder is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"seed": 7}, "it is a model with other weights"),
        ({"hidden_size": 128}, "it is a model of another shape"),
    ],
)
def test_another_model_is_refused(
    folder: Path, tmp_path: Path, other: dict[str, int], reason: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("transformers"))
    write_transformers_folder(copy / "transformers", architecture="llama", **other)
    with pytest.raises(ModelUnavailable, match=f": {reason}$"):
        load(copy)
    (copy / "transformers" / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"PREFILL_DTYPE=bfloat16 cannot use"):
        load(copy)

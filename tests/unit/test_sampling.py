"""Sampling: the formulas, the order in which they apply, and a model's own configuration."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_sidecar.engines.base import GenerationRequest, Sampling, softmax
from llm_sidecar.engines.sampling import (
    Sampler,
    filtered,
    penalised,
    read_sampling,
    sampling_of,
)
from llm_sidecar.errors import ModelUnavailable

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))


def kept(**sampling: Any) -> list[int]:
    """The tokens that may be chosen."""
    found = filtered(LOGITS, Sampling(**({"temperature": 1.0} | sampling)))
    return np.flatnonzero(found > -np.inf).tolist()


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 1}, [0]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        # The fewest that together reach it.
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.41}, [0, 1]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_p": 0.0}, [0]),
        ({"min_p": 0.49}, [0, 1, 2]),
        ({"min_p": 0.6}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        # Top-p counts what top-k leaves: 0.4 of 0.7 is 0.57.
        ({"top_k": 2, "top_p": 0.56}, [0]),
        ({"top_k": 3, "top_p": 0.56}, [0, 1]),
        # The temperature comes first: at 0.5 the probabilities are 0.55, 0.31, 0.14, ….
        ({"temperature": 0.5, "top_p": 0.5}, [0]),
        ({"temperature": 2.0, "top_p": 0.5}, [0, 1]),
    ],
)
def test_only_these_tokens_may_be_chosen(sampling: dict[str, Any], tokens: list[int]) -> None:
    assert kept(**sampling) == tokens


def test_equal_logits_at_the_edge_of_top_k_all_stay() -> None:
    found = filtered(np.array([1, 2, 2, 3], np.float32), Sampling(temperature=1.0, top_k=2))
    assert found.tolist() == [-np.inf, 2, 2, 3]


def test_a_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([2.0, -2.0, 2.0, -2.0, 0.0], np.float32)
    found = penalised(logits, np.array([0, 1, 4]), 4.0)
    assert found.tolist() == [0.5, -8.0, 2.0, -2.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0, 0.0]


def test_the_penalty_counts_the_prompt_and_what_follows_once_each() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 0], None)
    logits = np.array([4.0, 3.0, 2.5, 1.6], np.float32)
    assert sampler.sample(logits) == 1
    sampler.add([1, 1])
    assert sampler.sample(logits) == 2
    sampler.add([2])
    # Now 2.0, 1.5, 1.25 and 1.6.
    assert sampler.sample(logits) == 0


def test_without_a_penalty_a_token_may_repeat() -> None:
    sampler = Sampler(Sampling(), [0], None)
    sampler.add([0])
    assert sampler.sample(LOGITS) == 0


def test_guidance_comes_before_everything_but_the_penalty() -> None:
    allowed = np.array([1, 3, 4])
    assert Sampler(Sampling(), [], None).sample(LOGITS, allowed) == 1
    # Only the most probable of the allowed ones.
    one = Sampler(Sampling(temperature=1.0, top_k=1), [], 0)
    assert {one.sample(LOGITS, allowed) for _ in range(20)} == {1}
    # The penalty makes 3 more probable than 1.
    penalty = Sampler(Sampling(repetition_penalty=10.0), [1], None)
    assert penalty.sample(LOGITS, allowed) == 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, 5e-324])
def test_the_smallest_temperatures_choose_the_likeliest_token(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature, top_k=3, top_p=0.9, min_p=0.1), [], 1)
    assert sampler.sample(LOGITS) == int(LOGITS.argmax())


def test_tokens_are_as_frequent_as_their_probabilities() -> None:
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9)
    sampler = Sampler(sampling, [], 7)
    drawn = Counter(sampler.sample(LOGITS) for _ in range(4000))
    expected = softmax(filtered(LOGITS, sampling))
    for token, probability in enumerate(expected):
        assert drawn[token] / 4000 == pytest.approx(probability, abs=0.025)


def test_the_same_seed_gives_the_same_tokens() -> None:
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), [], seed)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


# The model's own


def test_a_request_replaces_the_temperature_and_top_p_of_the_model() -> None:
    own = Sampling(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.1)

    def of(**settings: float | None) -> Sampling:
        request = replace(GenerationRequest([], 1, temperature=None), **settings)  # type: ignore[arg-type]
        return sampling_of(request, own)

    assert of() == own
    assert of(top_p=0.5) == Sampling(0.7, 40, 0.5, repetition_penalty=1.1)
    assert of(temperature=1.2) == Sampling(1.2)
    assert of(temperature=1.2, top_p=0.0) == Sampling(1.2, top_p=0.0)


def configured(folder: Path, name: str, content: Any) -> Sampling:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_sampling(folder)


SILENT = Sampling(repetition_penalty=1.15)
"""Of a model whose files say nothing."""


def test_a_model_without_a_configuration_is_greedy_and_does_not_repeat_itself(
    tmp_path: Path,
) -> None:
    assert read_sampling(tmp_path) == SILENT


@pytest.mark.parametrize(
    ("content", "sampling"),
    [
        ({"eos_token_id": 2}, SILENT),
        ({"do_sample": False}, Sampling()),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Sampling()),
        # transformers samples only where the model says so.
        ({"temperature": 0.7}, SILENT),
        ({"do_sample": None, "temperature": None}, SILENT),
        ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
        ({"repetition_penalty": 1.0}, Sampling()),
        ({"do_sample": False, "repetition_penalty": 1.3}, Sampling(repetition_penalty=1.3)),
        ({"do_sample": True}, Sampling(1.0, 50)),
        ({"do_sample": True, "temperature": 0.0}, Sampling(0.0, 50)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "min_p": 0.05},
            Sampling(0.6, 50, 0.9, 0.05),
        ),
        (
            {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            Sampling(0.8, 20, 1.0, 0.0, 1.05),
        ),
    ],
)
def test_a_generation_config_is_read_as_transformers_reads_it(
    tmp_path: Path, content: dict[str, Any], sampling: Sampling
) -> None:
    assert configured(tmp_path, "generation_config.json", content) == sampling


@pytest.mark.parametrize(
    ("search", "sampling"),
    [
        (
            {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95},
            Sampling(0.8, 40, 0.95),
        ),
        ({"do_sample": False, "repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
        # What the model builder writes for every model says nothing.
        ({"do_sample": False, "repetition_penalty": 1.0, "top_k": 50}, SILENT),
        ({}, SILENT),
    ],
)
def test_an_onnx_model_has_its_sampling_in_its_own_configuration(
    tmp_path: Path, search: dict[str, Any], sampling: Sampling
) -> None:
    content = {"model": {}, "search": search}
    assert configured(tmp_path, "genai_config.json", content) == sampling
    # A generation_config.json comes first.
    own = {"do_sample": True, "temperature": 0.3}
    assert configured(tmp_path, "generation_config.json", own) == Sampling(0.3, 50)


def test_an_onnx_configuration_without_a_search_says_nothing(tmp_path: Path) -> None:
    assert configured(tmp_path, "genai_config.json", {"model": {}}) == SILENT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "no attribute 'get'"),
        ({"do_sample": True, "temperature": "hot"}, "not supported between"),
        ({"do_sample": True, "temperature": -1}, r"temperature must be from 0 to 100"),
        ({"do_sample": True, "top_k": -1}, r"top_k must be from 0 to"),
        ({"do_sample": True, "top_k": 50.0}, "cannot be interpreted as an integer"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must be from 0 to 1"),
        ({"do_sample": True, "min_p": 2}, r"min_p must be from 0 to 1"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be from 0.01 to 100"),
        ('{"repetition_penalty": NaN}', r"repetition_penalty must be from 0.01 to 100"),
    ],
)
def test_a_model_with_a_broken_configuration_does_not_load(
    tmp_path: Path, content: Any, reason: str
) -> None:
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        configured(tmp_path, "generation_config.json", content)
    assert caught.value.detail.endswith("; copy it again from the original")

"""Samples the next token from the logits, as the model or the request configures it.

Order and formulas are those of transformers' logits processors: repetition penalty, temperature,
top-k, top-p, min-p.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import GenerationRequest, Sampling, softmax
from llm_sidecar.errors import ModelUnavailable

Logits = npt.NDArray[np.float32]

SAMPLING_FILE: Final = "generation_config.json"
_DEFAULT_TOP_K: Final = 50
"""Of a model that samples and sets no `top_k`, as in transformers."""
_DEFAULT_PENALTY: Final = 1.15
"""Of a model whose files say nothing about sampling: small models repeat themselves without end
when they are greedy."""
_FILLED_IN: Final = {"do_sample": False, "repetition_penalty": 1.0}
"""What the model builder writes into each genai_config.json."""
_LEAST_TEMPERATURE: Final = 1e-6
"""Logits divided by less may overflow; the most likely token is certain long before."""
_BOUNDS: Final = (
    ("temperature", 0, 100),
    ("top_k", 0, 1 << 31),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
)


class Sampler:
    """Chooses the tokens of one completion."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], seed: int | None) -> None:
        """Starts with the prompt.

        Args:
            sampling: the configuration.
            prompt: its tokens.
            seed: makes the choices repeatable; None for random ones.
        """
        self._sampling = sampling
        self._random = np.random.default_rng(seed)
        self._used = np.unique(np.asarray(prompt, np.int64))

    def add(self, tokens: Sequence[int]) -> None:
        """Counts tokens as used."""
        if self._sampling.repetition_penalty != 1.0:
            self._used = np.union1d(self._used, tokens)

    def sample(self, logits: Logits, allowed: npt.NDArray[np.intp] | None = None) -> int:
        """Samples a token.

        Args:
            logits: (vocabulary,) of the next token.
            allowed: the tokens that guidance allows, ascending; None for all.
        """
        logits = penalised(logits, self._used, self._sampling.repetition_penalty)
        if allowed is None:
            return self._draw(logits)
        return int(allowed[self._draw(logits[allowed])])

    def _draw(self, logits: Logits) -> int:
        """Samples an index of `logits`."""
        if self._sampling.temperature == 0.0:
            return int(logits.argmax())
        bounds = softmax(filtered(logits, self._sampling)).cumsum()
        return int(bounds.searchsorted(self._random.random() * bounds[-1], side="right"))


def penalised(logits: Logits, used: npt.NDArray[np.int64], penalty: float) -> Logits:
    """The logits after the repetition penalty of the tokens in `used`."""
    if penalty == 1.0:
        return logits
    logits, found = logits.copy(), logits[used]
    logits[used] = np.where(found < 0, found * penalty, found / penalty)
    return logits


def filtered(logits: Logits, sampling: Sampling) -> Logits:
    """The logits divided by the temperature, with -inf for tokens that cannot be chosen.

    Args:
        sampling: with a temperature above 0.
    """
    scores = logits / max(sampling.temperature, _LEAST_TEMPERATURE)
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1.0:
        # Without the tokens that top-k has left out, so that only few are sorted.
        candidates = np.flatnonzero(scores > -np.inf)
        rising = candidates[scores[candidates].argsort(kind="stable")]
        beyond = softmax(scores[rising]).cumsum() <= 1.0 - sampling.top_p
        beyond[-1] = False
        scores[rising[beyond]] = -np.inf
    if sampling.min_p > 0.0:
        probabilities = softmax(scores)
        scores[probabilities < sampling.min_p * probabilities.max()] = -np.inf
    return scores


def sampling_of(request: GenerationRequest, own: Sampling) -> Sampling:
    """How the tokens of a request are chosen.

    Args:
        own: the model's own sampling, for a request without a temperature.
    """
    sampling = own if request.temperature is None else Sampling(request.temperature)
    return sampling if request.top_p is None else replace(sampling, top_p=request.top_p)


def read_sampling(folder: Path) -> Sampling:
    """A model's own sampling, from its generation_config.json, or else its genai_config.json.

    `do_sample` says whether it samples. A model whose files say nothing is greedy with a repetition
    penalty. What the model builder writes into every genai_config.json says nothing.

    Raises:
        ModelUnavailable: a file is broken, or has a value that cannot be used.
    """
    for name in (SAMPLING_FILE, "genai_config.json"):
        if (folder / name).is_file() and (found := _read(folder / name)) is not None:
            return found
    return Sampling(repetition_penalty=_DEFAULT_PENALTY)


def _read(file: Path) -> Sampling | None:
    """The sampling in a file; None if it says nothing."""
    try:
        configured = json.loads(file.read_bytes())
        if file.name == "genai_config.json":
            search = configured.get("search", {}).items()
            configured = {name: value for name, value in search if value != _FILLED_IN.get(name)}
        return _sampling_of(configured)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelUnavailable(
            f"{file} has no valid sampling parameters ({error}); copy it again from the original"
        ) from None


def _sampling_of(configured: Mapping[str, Any]) -> Sampling | None:
    """Raises ValueError or TypeError for a value that cannot be used."""
    given = {
        field.name: configured[field.name]
        for field in fields(Sampling)
        if configured.get(field.name) is not None
    }
    found = Sampling(**{"temperature": 1.0, "top_k": _DEFAULT_TOP_K} | given)
    for name, least, most in _BOUNDS:
        if not least <= getattr(found, name) <= most:
            raise ValueError(f"{name} must be from {least} to {most}")
    operator.index(found.top_k)
    if configured.get("do_sample") is True:
        return found
    if configured.get("do_sample") is None and "repetition_penalty" not in given:
        return None
    return Sampling(repetition_penalty=found.repetition_penalty)

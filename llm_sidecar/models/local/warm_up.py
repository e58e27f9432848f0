"""Loads an engine, measures its speed and generates one token, so that the first request is as fast
as later ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.local.protocol import Load
from llm_sidecar.models.status import Speed

log = logging.getLogger(__name__)

_STEPS: Final = 4
"""Decode steps that are measured: a second of a model of 8B parameters, milliseconds of a small
one."""
_RESOLUTION: Final = 1e-6
"""Seconds; the shortest time that counts."""
_TURN: Final = {"role": "user", "content": "Hello."}


def load_warm(
    load: Load, clock: Callable[[], float] = time.perf_counter
) -> tuple[Engine, Speed | None]:
    """Loads the engine, prefills the prefix, and generates one token of a turn after it.

    The token has the prefix's guidance, so that the grammar is compiled too.

    Returns:
        the engine, and its speed in the prefill of the prefix and in a few decode steps; None for
        the speed without a prefix.

    Raises:
        SidecarError: the model cannot be loaded; says why.
    """
    engine = load_engine(
        Path(load.model),
        adapter=None if load.adapter is None else Path(load.adapter),
        **asdict(load.options),
    )
    steps = engine.decode_steps(_STEPS)
    next(steps)
    decode = _STEPS / _seconds(steps, clock)
    prefill = None if load.prefix is None else _prefill(engine, load.prefix, clock)
    messages = [] if load.prefix is None or prefill is None else load.prefix.messages
    guidance = None if load.prefix is None else load.prefix.guidance
    for _ in engine.stream(GenerationRequest([*messages, _TURN], 1, guidance)):
        pass
    return engine, None if prefill is None else Speed(prefill, decode)


def _prefill(engine: Engine, prefix: GenerationRequest, clock: Callable[[], float]) -> float | None:
    """Prefills a prefix and returns the tokens per second; logs a failure and returns None, because
    the model can serve without it."""
    try:
        tokens = engine.tokenize(prefix, header=False)
        return len(tokens) / _seconds(engine.prefill(replace(prefix, tokens=tokens)), clock)
    except InvalidRequest:
        log.warning("the few-shot examples do not fit the context, so they are not prefilled")
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
        # The type only: a runtime's message may quote the examples.
        log.error("a prefix could not be prefilled: %s", type(error).__name__)
    return None


def _seconds(steps: Generator[None], clock: Callable[[], float]) -> float:
    began = clock()
    for _ in steps:
        pass
    return max(clock() - began, _RESOLUTION)

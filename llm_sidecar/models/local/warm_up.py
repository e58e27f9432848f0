"""Loads an engine and generates one token, so that the first request is as fast as later ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.local.protocol import Load

log = logging.getLogger(__name__)

_TURN: Final = {"role": "user", "content": "Hello."}


def load_warm(load: Load) -> Engine:
    """Loads the engine, prefills the prefix, and generates one token of a turn after it.

    The token has the prefix's guidance, so that the grammar is compiled too.

    Raises:
        SidecarError: the model cannot be loaded; says why.
    """
    guidance = None if load.prefix is None else load.prefix.guidance
    engine = load_engine(
        Path(load.folder),
        device=load.device,
        threads=load.threads,
        adapter=None if load.adapter is None else Path(load.adapter),
    )
    prefilled = load.prefix is not None and _prefill(engine, load.prefix)
    messages = load.prefix.messages if load.prefix is not None and prefilled else []
    for _ in engine.stream(GenerationRequest([*messages, _TURN], 1, guidance)):
        pass
    return engine


def _prefill(engine: Engine, prefix: GenerationRequest) -> bool:
    """Prefills a prefix; logs a failure, because the model can serve without it."""
    try:
        for _ in engine.prefill(prefix):
            pass
    except InvalidRequest:
        log.warning("the few-shot examples do not fit the context, so they are not prefilled")
        return False
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
        # The type only: a runtime's message may quote the examples.
        log.error("a prefix could not be prefilled: %s", type(error).__name__)
        return False
    return True

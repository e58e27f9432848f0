"""The common parts of all generated answers under `/v1`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llm_sidecar.services.conversation import Finished
from osiris.response_headers import generation_headers


def new_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The first fields of an answer.

    Args:
        prefix: of its id.
        kind: its `object`.
        model: as the request names it.
    """
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(finished: Sequence[Finished], prompts: int = 1) -> dict[str, Any]:
    """The numbers of tokens of all choices.

    Args:
        finished: the ends of all choices, in order.
        prompts: the number of prompts; each has the same number of choices.
    """
    first_of_prompts = finished[:: max(1, len(finished) // prompts)]
    prompt_tokens = sum(one.completion.prompt_tokens for one in first_of_prompts)
    completion_tokens = sum(one.completion.completion_tokens for one in finished)
    cached = sum(one.completion.cached_tokens for one in first_of_prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def headers_of(finished: Sequence[Finished], prompts: int = 1) -> dict[str, str]:
    """The response headers of an answer: of its first choice, with the token counts of all."""
    counts = usage(finished, prompts)
    first = finished[0]
    completion = replace(
        first.completion,
        prompt_tokens=counts["prompt_tokens"],
        completion_tokens=counts["completion_tokens"],
        # Under /v1 a deadline counts as `length`.
        finish_reason="stop" if first.completion.finish_reason == "stop" else "length",
    )
    headers = generation_headers(completion)
    if first.grounded is not None:
        headers["X-Grounded"] = first.grounded
    return headers

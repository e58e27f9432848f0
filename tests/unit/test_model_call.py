"""The times and counts that a call records."""

from __future__ import annotations

from llm_sidecar.telemetry.calls import FinishReason, ModelCall


def progressed(
    call: ModelCall, now: float, tokens: int, finish_reason: FinishReason | None = None
) -> None:
    call.progressed(
        now,
        prompt_tokens=7,
        completion_tokens=tokens,
        cached_tokens=3,
        finish_reason=finish_reason,
    )


def test_the_first_progress_is_the_first_token_and_later_ones_are_steps() -> None:
    call = ModelCall("phi3", "generate", queued=1.0)
    progressed(call, 3.0, 1)
    assert (call.first_token, call.steps) == (3.0, [])
    progressed(call, 3.5, 5)
    # Progress without new tokens is not a step, but the next step begins at it.
    progressed(call, 3.75, 5)
    progressed(call, 4.0, 6, "stop")
    assert call.first_token == 3.0
    assert call.steps == [(0.5, 4), (0.25, 1)]
    assert (call.prompt_tokens, call.completion_tokens, call.cached_tokens) == (7, 6, 3)
    assert call.finish_reason == "stop"


def test_the_phases_reach_as_far_as_the_call() -> None:
    call = ModelCall("phi3", "generate", queued=1.0)
    assert call.phases() == []
    call.begun = 2.0
    assert call.phases() == [("queue", 1.0, 2.0)]
    progressed(call, 3.0, 1)
    call.finished = 5.0
    assert call.phases() == [("queue", 1.0, 2.0), ("prefill", 2.0, 3.0), ("decode", 3.0, 5.0)]

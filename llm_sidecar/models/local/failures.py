"""The errors of failed jobs: a worker reports them, and the server raises them again."""

from __future__ import annotations

import logging
import traceback

from llm_sidecar.errors import InvalidRequest, ModelUnavailable, SidecarError
from llm_sidecar.models.failover import ReplicaLost
from llm_sidecar.models.local.protocol import Failed

log = logging.getLogger(__name__)


class WorkerLost(ReplicaLost):
    """A worker has ended with a request that it had begun."""

    def __init__(self, model: str, how: str) -> None:
        """The error for the caller, unless another worker repeats the request.

        Args:
            model: `phi3` or `hermes`.
            how: its exit status or signal, in words.
        """
        super().__init__(
            f"The {model} worker ended while it answered ({how}); try again.", retry_after=1
        )


def failed(number: int, error: Exception) -> Failed:
    """Logs that a job has failed, and reports it with the reason if that is known."""
    if isinstance(error, InvalidRequest):
        return Failed(
            id=number,
            detail=error.problem,
            invalid=True,
            field=error.field,
            exceeds_context=error.exceeds_context,
        )
    if isinstance(error, SidecarError):
        log.error("a request failed: %s", error.detail)
        return Failed(id=number, detail=error.detail)
    # Only the type and the location: a runtime's message may quote the prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed in the engine: %s\n%s", type(error).__name__, frames)
    return Failed(id=number, detail=type(error).__name__)


def error_of(answer: Failed, name: str) -> SidecarError:
    """The error of a job of this model that has failed."""
    if answer.invalid:
        return InvalidRequest(
            answer.detail, field=answer.field, exceeds_context=answer.exceeds_context
        )
    return ModelUnavailable(
        f"The {name} model failed on this request ({answer.detail}); see the log.", retry_after=1
    )

"""Messages between a `RayModel` and the replicas of its model: one JSON object each.

The sidecar sends a `Call`, and a replica streams its answers:

    Begun, Generated, ...   The last one has a finish reason.
    Begun, Scored
    Refused                 instead of any of them.

It also sends an order to all replicas at once, and each of them replies:

    Look                    ReplicaState
    Prefill, UseAdapter     Done, or Refused

Only bytes cross between processes, because two versions meet while an application is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from llm_sidecar.engines.base import ChoiceScores, GenerationRequest, Question
from llm_sidecar.errors import (
    AdapterRejected,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
    SidecarError,
    Unavailable,
)
from llm_sidecar.models.completion import Delta
from llm_sidecar.models.failover import ReplicaLost
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.status import ModelStatus


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A generation, or questions to be scored.

    Attributes:
        request: the generation; None for questions.
        elapsed, seconds: how long ago the request began, and how long it may take. The clocks of
            two machines differ, so no time of day is sent.
    """

    request: GenerationRequest | None = None
    questions: Sequence[Question] = ()
    elapsed: float
    seconds: float


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A replica begins with a call.

    Attributes:
        waited: seconds since the call arrived there.
        model, adapter, identity: who answers; see `Delta`.
    """

    waited: float
    model: str
    adapter: str | None
    identity: ModelIdentity | None


class Generated(msgspec.Struct, frozen=True, tag=True):
    """New text. The delta has no identity, because `Begun` has it."""

    delta: Delta


class Scored(msgspec.Struct, frozen=True, tag=True):
    """The scores of each question, in order."""

    scores: list[ChoiceScores]


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An error instead of an answer.

    Attributes:
        kind: the name of its class.
        detail: of the error; of an `InvalidRequest`, its `problem`.
        retry_after, field, exceeds_context: of the error.
    """

    kind: str
    detail: str
    retry_after: int | None = None
    field: str | None = None
    exceeds_context: bool = False


class Look(msgspec.Struct, frozen=True, tag=True):
    """Asks for the state."""


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """Prefills the messages that later requests begin with.

    Attributes:
        replica: the only one that does so; None for all.
    """

    request: GenerationRequest
    replica: str | None = None


class UseAdapter(msgspec.Struct, frozen=True, tag=True):
    """Changes the adapter of one replica.

    Attributes:
        adapter: the name of its folder, or None. Each machine has a folder of its own.
    """

    adapter: str | None
    replica: str


class ReplicaState(msgspec.Struct, frozen=True, tag=True):
    """The state of a replica."""

    replica: str
    status: ModelStatus


class Done(msgspec.Struct, frozen=True, tag=True):
    """The order is obeyed, or was for another replica.

    Attributes:
        replica: that has obeyed; None if it was for another one.
    """

    replica: str | None = None


Answer = Begun | Generated | Scored | Refused
Order = Look | Prefill | UseAdapter
Reply = ReplicaState | Done | Refused


def _from_json(kind: type, value: Any) -> Any:
    return kind(value)


CALL: Final = msgspec.json.Decoder(Call)
ANSWER: Final = msgspec.json.Decoder(Answer)
ORDER: Final = msgspec.json.Decoder(Order)
REPLY: Final = msgspec.json.Decoder(Reply, dec_hook=_from_json)
_PATHS: Final = msgspec.json.Encoder(enc_hook=str)

_KINDS: Final[dict[str, type[SidecarError]]] = {
    kind.__name__: kind
    for kind in (
        InvalidRequest,
        AdapterRejected,
        QueueFull,
        Unavailable,
        ModelUnavailable,
        ReplicaLost,
        DeadlineExceeded,
    )
}


def encode(message: msgspec.Struct) -> bytes:
    """The message as bytes.

    Raises:
        InvalidRequest: a text is no Unicode.
    """
    try:
        return _PATHS.encode(message)
    except UnicodeEncodeError:
        raise InvalidRequest(
            "it holds half of a surrogate pair; send Unicode text", field="prompt"
        ) from None


def refused(error: SidecarError) -> Refused:
    """The error as a message. One of an unknown kind is that of its nearest known base class."""
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS)
    if not isinstance(error, InvalidRequest):
        return Refused(kind=kind, detail=error.detail, retry_after=error.retry_after)
    return Refused(
        kind=kind,
        detail=error.problem,
        retry_after=error.retry_after,
        field=error.field,
        exceeds_context=error.exceeds_context,
    )


def error_of(message: Refused) -> SidecarError:
    """The error that `refused` has sent; one that only a newer version knows is a
    ModelUnavailable."""
    kind = _KINDS.get(message.kind, ModelUnavailable)
    if not issubclass(kind, InvalidRequest):
        return kind(message.detail, retry_after=message.retry_after)
    return kind(
        message.detail,
        retry_after=message.retry_after,
        field=message.field,
        exceeds_context=message.exceeds_context,
    )

"""The capabilities of a server, found by probes: product names and versions say too little.

Each probe is a request of a few tokens. A server that does not know a field refuses or ignores it;
the answer shows which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models.remote.chunks import MOST_LIKELY, Chunk, read_chunk
from llm_sidecar.models.remote.connection import Connection
from llm_sidecar.models.remote.decisions import decision_body, is_of_sidecar, read_decision
from llm_sidecar.models.remote.guiding import FREE_TEXT, PROBE_TEXT, SCHEMA_FORMATS
from llm_sidecar.models.remote.refusals import Refused, broken

_FEWER: Final = 5
_PROBE_TOKENS: Final = 8
_LEAST_PROBE_TEXT: Final = 3
"""Number of characters that identify the probe's text: no other JSON object begins so by chance."""
_LONGEST_NAME: Final = 1024
"""Characters of the name of a model, which becomes a header and a column. It may be a path."""
_QUESTION: Final = "Write a JSON object."


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server can do.

    Attributes:
        schema_formats: the names of the formats in which it takes a schema, strictest first.
        top_logprobs: the number of most likely tokens whose log probabilities it returns; 0 if it
            returns none.
        decisions: whether it scores by `/v1/decisions`.
        adapters: whether it loads LoRA adapters at run time.
    """

    schema_formats: tuple[str, ...]
    top_logprobs: int
    decisions: bool
    adapters: bool

    @property
    def scores(self) -> Literal["decisions", "logprobs", "text"]:
        """How answers are scored; see `scores`."""
        if self.decisions:
            return "decisions"
        return "logprobs" if self.top_logprobs else "text"


class _Model(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(max_length=_LONGEST_NAME)]
    parent: Any = None


class _Models(msgspec.Struct):
    data: list[_Model]


async def list_models(connection: Connection, deadline: Deadline) -> list[str]:
    """The names of the server's models, without the adapters of these models.

    Raises:
        SidecarError, TimeoutError
    """
    answer = await connection.get("/models", deadline)
    try:
        models = msgspec.json.decode(answer, type=_Models).data
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise broken(connection.name, "answers /models with something other than models") from None
    names = {model.id for model in models}
    # A set, because a server may list very many models. A parent may have any type.
    return [
        model.id
        for model in models
        if not isinstance(model.parent, str) or model.parent not in names
    ]


def choose_model(name: str, configured: str | None, listed: list[str]) -> str:
    """The name of the model to ask.

    Args:
        name: `phi3` or `hermes`.
        configured: the name in the settings. It need not be listed: some servers list other names
            than they accept.
        listed: what `list_models` returns.

    Raises:
        ModelUnavailable: the settings must name one of several models.
    """
    if configured is not None:
        return configured
    if name in listed:
        # The server is another sidecar.
        return name
    if len(listed) == 1:
        return listed[0]
    raise ModelUnavailable(
        f"The {name} server lists {len(listed)} models; set {name.upper()}_REMOTE_MODEL to one.",
        retry_after=30,
    )


async def find_capabilities(connection: Connection, model: str, deadline: Deadline) -> Capabilities:
    """Finds out what a server can do with one of its models.

    Raises:
        SidecarError: it does not answer a plain chat.
        TimeoutError: the deadline passes.
    """
    probes = _Probes(connection, model, deadline)
    await probes.chat(FREE_TEXT, 1)
    return Capabilities(
        tuple([each.name for each in SCHEMA_FORMATS if await probes.is_guided_by(each.probe)]),
        await probes.top_logprobs(),
        await probes.has_decisions(),
        await probes.loads_adapters(),
    )


class _Probes:
    """Sends the probes to one server."""

    def __init__(self, connection: Connection, model: str, deadline: Deadline) -> None:
        self._connection = connection
        self._model = model
        self._deadline = deadline

    async def chat(self, fields: dict[str, Any], max_tokens: int = _PROBE_TOKENS) -> Chunk:
        """The completion of a short chat."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": _QUESTION}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            **fields,
        }
        answer = await self._connection.post("/chat/completions", body, self._deadline)
        return read_chunk(self._connection.name, answer)

    async def is_guided_by(self, fields: dict[str, Any]) -> bool:
        """Whether an answer follows the schema of a probe, apart from whitespace."""
        try:
            text = (await self.chat(fields)).text
        except (Refused, InvalidRequest):
            return False
        compact = "".join(text.split())
        # The limit of tokens may truncate the answer.
        return len(compact) >= _LEAST_PROBE_TEXT and PROBE_TEXT.startswith(compact)

    async def top_logprobs(self) -> int:
        """See `Capabilities`."""
        for asked in (MOST_LIKELY, _FEWER):
            try:
                fields = {"logprobs": True, "top_logprobs": asked, **FREE_TEXT}
                chunk = await self.chat(fields, 1)
            except (Refused, InvalidRequest):
                continue
            return min(asked, len(chunk.logprobs[0].top)) if chunk.logprobs else 0
        return 0

    async def has_decisions(self) -> bool:
        """Whether the server answers a question of two choices with their probabilities.

        False for another sidecar: it numbers the options, and a model confuses these numbers with
        answers that are numbers. Its log probabilities give the same scores as its own.
        """
        body = decision_body(self._model, "It rains.", ("yes", "no"))
        try:
            answer = await self._connection.post("/decisions", body, self._deadline)
            return len(read_decision(answer)) == 2 and not is_of_sidecar(answer)
        except (Refused, InvalidRequest, ValueError):
            return False

    async def loads_adapters(self) -> bool:
        """Whether the path for adapters exists: if so, it refuses a request without an adapter."""
        try:
            await self._connection.post("/load_lora_adapter", {}, self._deadline)
        except Refused:
            return False
        except InvalidRequest:
            return True
        return False

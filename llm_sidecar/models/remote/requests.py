"""Generation requests as requests of OpenAI's API."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from llm_sidecar.engines.base import GenerationRequest
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.remote.capabilities import Capabilities
from llm_sidecar.models.remote.guiding import FREE_TEXT, Body, guided, in_prompt
from llm_sidecar.models.remote.regex import schema_regex

_EVENT_BYTES: Final = 1 << 12
"""Upper bound of the size of an event of one token."""
_LOGPROB_BYTES: Final = 1 << 9
"""Upper bound of the size of one of the most likely tokens."""
_FURTHER_EVENTS: Final = 64
"""Upper bound of the events of an answer that carry no token."""
_MOST_BYTES: Final = 32 << 20
"""Upper bound of the size of an answer, whatever `max_tokens` is: more than 100,000 usual events,
or 10,000 with the 20 most likely tokens."""
_SEED_BITS: Final = 31
"""Some servers accept only a signed integer of 32 bits."""


class RemoteRequest(NamedTuple):
    """A streamed request to a server.

    Attributes:
        path: below the base URL.
        body: as JSON types.
        most_bytes: maximum size of the answer.
        in_prompt: whether only the prompt asks for JSON, without guidance.
    """

    path: str
    body: Body
    most_bytes: int
    in_prompt: bool = False


def remote_request(
    request: GenerationRequest, model: str, capabilities: Capabilities
) -> RemoteRequest:
    """The request for a generation, with the strictest guidance that a server supports.

    Takes some milliseconds for a new guidance.

    Args:
        model: its name on the server.

    Raises:
        InvalidRequest: the server does not support the request, or a schema to check has keywords
            that are not supported, which the error names.
    """
    if request.prompt_logprobs is not None or request.echo or request.max_tokens == 0:
        raise InvalidRequest(
            "a model on another server only continues prompts; leave it out", field="echo"
        )
    body: Body = {"model": model, "max_tokens": request.max_tokens, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | _sampling(request)
    messages, only_in_prompt = list(request.messages), False
    if request.guidance is not None:
        if request.check_answer:
            _check_schema(request.guidance)
        fields = guided(capabilities.schema_formats, request.guidance)
        if fields is None:
            _check_bounded(request.guidance)
            messages, only_in_prompt = in_prompt(messages, request.guidance), True
        body |= fields or {}
    likely = _top_logprobs(request, capabilities)
    event_bytes = _EVENT_BYTES + _LOGPROB_BYTES * (likely or 0)
    most_bytes = min(_MOST_BYTES, (request.max_tokens + _FURTHER_EVENTS) * event_bytes)
    if request.text is None and request.messages:
        body["messages"] = messages
        if request.guidance is None:
            body |= FREE_TEXT
        if likely is not None:
            body |= {"logprobs": True, "top_logprobs": likely}
        return RemoteRequest("/chat/completions", body, most_bytes, only_in_prompt)
    body["prompt"] = list(request.tokens or ()) if request.text is None else request.text
    if likely is not None:
        body["logprobs"] = likely
    return RemoteRequest("/completions", body, most_bytes)


def _sampling(request: GenerationRequest) -> Body:
    """The sampling fields that are set; the server chooses the others."""
    seed = None if request.seed is None else request.seed % (1 << _SEED_BITS)
    fields: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": seed,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _check_schema(schema: str) -> None:
    # Imported for the first such request only: the API process needs llguidance for nothing else.
    from llm_sidecar.engines.answer_check import check_schema

    check_schema(schema)


def _check_bounded(guidance: str) -> None:
    """Raises InvalidRequest for a schema that a model is likely to violate if only the prompt has
    it: a client's schema. One that fits a regular expression is short, and checked later."""
    try:
        schema_regex(guidance)
    except ValueError:
        raise InvalidRequest(
            "the server of this model cannot follow this schema", field="schema"
        ) from None


def _top_logprobs(request: GenerationRequest, capabilities: Capabilities) -> int | None:
    if request.logprobs is None:
        return None
    if not capabilities.top_logprobs:
        raise InvalidRequest("the server of this model returns none", field="logprobs")
    return min(request.logprobs, capabilities.top_logprobs)

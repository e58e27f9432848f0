"""Every endpoint except the streams, for both clients."""

from __future__ import annotations

import base64
import re
import urllib.parse
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

import httpx

from osiris.llm_client.core import (
    ANSWER_TIMEOUT,
    CONNECT_TIMEOUT,
    PROBE_TIMEOUT,
    SPEECH_TIMEOUT,
    Core,
    Plan,
)
from osiris.llm_client.errors import LLMClientError

STREAM_SILENCE: Final = 60.0
"""Seconds without a byte, even of a keep-alive comment, after which a stream counts as broken."""

JSON = dict[str, Any]

JSONAnswer = TypeVar("JSONAnswer")
Text = TypeVar("Text")
Wav = TypeVar("Wav")
Flag = TypeVar("Flag")


class Endpoints(ABC, Generic[JSONAnswer, Text, Wav, Flag]):
    """Every endpoint except the streams, for both clients.

    All methods raise `LLMClientHTTPError` if the answer is an error, `LLMClientConnectionError` if
    the sidecar cannot be reached, and `LLMClientError` if the answer cannot be parsed. Before that,
    they retry 5xx, 429 and connection errors.

    Every POST except `speak` has an `Idempotency-Key`, the same for all attempts of a call, so that
    the server generates and stores once. A caller that repeats a call itself, for example after a
    restart, passes the same `idempotency_key` again: 1 to 255 visible ASCII characters, otherwise
    ValueError. The default is a new UUID.
    """

    _core: Core
    _http: httpx.Client | httpx.AsyncClient

    @abstractmethod
    def _run(self, plan: Plan[Any]) -> Any:
        """Carries out a plan; returns its answer, or an awaitable of it."""

    def generate(
        self,
        model_id: str,
        prompt: str,
        max_length: int = 256,
        *,
        idempotency_key: str | None = None,
    ) -> JSONAnswer:
        """Generates an answer of `hermes` or `phi3` with at most `max_length` new tokens; phi3
        needs 96.

        Returns:
            `{"generated_text": str}` from hermes, the proposal itself from phi3.
        """
        return self._json(*_generation(model_id, prompt, max_length), idempotency_key)

    def propose_trade_adjustments(
        self, prompt: str, max_length: int = 256, *, idempotency_key: str | None = None
    ) -> JSONAnswer:
        """Generates a proposal with its critique, each with at most `max_length` new tokens, at
        least 96.

        Returns:
            `{"transaction_id": str, "phi3_proposal": {...}, "hermes_assessment": str}`.
        """
        return self._json(*_proposal(prompt, max_length), idempotency_key)

    def score_hermes(
        self,
        proposal: JSON,
        context: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> JSONAnswer:
        """Scores a proposal; returns `{"proposal_id": str, "score": float from 0 to 1}`."""
        body = _given(proposal=proposal, context=context)
        return self._json("POST", "/score/hermes/", body, idempotency_key)

    def submit_feedback(
        self,
        transaction_id: str,
        feedback_type: str,
        feedback_content: str | JSON,
        *,
        timestamp: datetime | str | None = None,
        corrected_proposal: JSON | None = None,
        schema_version: str = "1.0",
        idempotency_key: str | None = None,
    ) -> JSONAnswer:
        """Stores feedback on a proposal; returns `{"message": str, "transaction_id": str}`.

        The sidecar answers once the row is durable. A retry has the same key and the same
        timestamp, so the sidecar recognises the same feedback and stores it once.

        Args:
            transaction_id: the id of the proposal's run.
            feedback_type: `correction`, `rating`, `qualitative_comment` or `human_edit`.
            feedback_content: text or an object.
            timestamp: when the feedback was given; default: now, or with an `idempotency_key` when
                the sidecar gets it, so that each call sends the same. At most five minutes ahead of
                the sidecar's clock. A naive `datetime` is in this machine's time zone, and is sent
                with its offset from UTC. A text must be ISO 8601, and is sent unchanged.
            corrected_proposal: the proposal as it should have been.
            schema_version: version of the feedback's format.
            idempotency_key: the same for every attempt of this call.
        """
        now = datetime.now(UTC) if idempotency_key is None else None
        when = now if timestamp is None else timestamp
        body = _given(
            transaction_id=transaction_id,
            feedback_type=feedback_type,
            feedback_content=feedback_content,
            timestamp=_aware(when).isoformat() if isinstance(when, datetime) else when,
            corrected_proposal=corrected_proposal,
            schema_version=schema_version,
        )
        return self._json("POST", "/feedback/phi3/", body, idempotency_key)

    def withdraw_feedback(self, feedback_id: str) -> JSONAnswer:
        """Withdraws feedback: from then on it is neither a few-shot example nor training data.

        Args:
            feedback_id: from `list_examples`, an event on Redis or the header `X-Feedback-ID`.

        Returns:
            `{"message": str, "feedback_id": str}`; error 404 if there is no such feedback.
        """
        # Without the last slash, an id that ends in a slash would be read as a shorter one.
        return self._json("DELETE", f"/feedback/{urllib.parse.quote(feedback_id, safe='')}/")

    def list_examples(self) -> JSONAnswer:
        """The few-shot examples in use, oldest first.

        Returns:
            `{"items": [{"transaction_id", "feedback_id", "prompt", "proposal"}], "next": None}`.
        """
        return self._json("GET", "/examples/")

    def speak(self, text: str, exaggeration: float = 0.5, ref_wav: bytes | None = None) -> Wav:
        """Converts text to speech; `ref_wav`, the bytes of a WAV file, is the voice to imitate.

        Returns:
            The bytes of one WAV file.
        """
        ref_wav_b64 = None if ref_wav is None else base64.b64encode(ref_wav).decode()
        body = _given(text=text, exaggeration=exaggeration, ref_wav_b64=ref_wav_b64)
        request = self._request("POST", "/speak", body, SPEECH_TIMEOUT)
        wav: Wav = self._run(self._core.attempts(request, _read_wav))
        return wav

    def swap_adapters(
        self, adapter: str | None = None, *, idempotency_key: str | None = None
    ) -> JSONAnswer:
        """Switches the adapter; returns `{"status": "ok", "phi3_adapter_date": str or None}`.

        Args:
            adapter: `YYYYMMDD` or `YYYYMMDD-dpo`; default: the newest.
        """
        body = None if adapter is None else {"adapter": adapter}
        return self._json("POST", "/adapters/swap", body, idempotency_key)

    def list_dead_letters(self, limit: int = 100, before: str | None = None) -> JSONAnswer:
        """The entries of the inbox that no sidecar could store, newest first.

        Args:
            limit: their maximum number, 1 to 500.
            before: `next` of the previous page.

        Returns:
            `{"items": [{"id", "time", "reason", "entry", "deliveries", "fields"}], "next": str or
            None}`.
        """
        query = urllib.parse.urlencode(_given(limit=limit, before=before))
        return self._json("GET", f"/events/dead?{query}")

    def requeue_dead_letter(
        self, dead_letter_id: str, *, idempotency_key: str | None = None
    ) -> JSONAnswer:
        """Puts a dead letter back into the inbox, as a new entry.

        Returns:
            `{"message": str, "id": str, "entry": str}`; error 404 if there is no such dead letter.
        """
        path = f"/events/dead/{urllib.parse.quote(dead_letter_id, safe='')}/requeue"
        return self._json("POST", path, None, idempotency_key)

    def health(self) -> JSONAnswer:
        """The state of the sidecar and of each of its components."""
        return self._json("GET", "/health")

    def live(self) -> Flag:
        """Whether the sidecar runs; False also if it cannot be reached. Does not retry."""
        return self._probe("/health/live")

    def ready(self) -> Flag:
        """Whether the sidecar is ready; False also if it cannot be reached. Does not retry."""
        return self._probe("/health/ready")

    def metrics(self) -> Text:
        """The metrics as Prometheus text; error 404 if they are off."""
        request = self._request("GET", "/metrics")
        text: Text = self._run(self._core.attempts(request, lambda response: response.text))
        return text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.base_url!r})"

    def _json(
        self, method: str, path: str, body: JSON | None = None, idempotency_key: str | None = None
    ) -> JSONAnswer:
        request = self._keyed(method, path, body, idempotency_key)
        answer: JSONAnswer = self._run(self._core.attempts(request, _read_json))
        return answer

    def _keyed(
        self, method: str, path: str, body: JSON | None, idempotency_key: str | None
    ) -> httpx.Request:
        request = self._request(method, path, body)
        if method == "POST":
            request.headers["Idempotency-Key"] = _checked(idempotency_key)
        return request

    def _probe(self, path: str) -> Flag:
        request = self._request("GET", path, timeout=PROBE_TIMEOUT)
        flag: Flag = self._run(self._core.probe(request))
        return flag

    def _request(
        self, method: str, path: str, body: JSON | None = None, timeout: float = ANSWER_TIMEOUT
    ) -> httpx.Request:
        # One id for all attempts of a call, so that the sidecar's log groups them.
        headers = {"X-Request-ID": str(uuid.uuid4())}
        limits = self._core.timeout or httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
        return self._http.build_request(method, path, json=body, headers=headers, timeout=limits)

    def _audio_plan(self) -> Plan[httpx.Response]:
        return self._stream_plan(self._request("GET", "/stream/audio"))

    def _events_plan(
        self, types: Iterable[str] | None, last_event_id: str | None
    ) -> Plan[httpx.Response]:
        query = "" if types is None else f"?{urllib.parse.urlencode({'types': ','.join(types)})}"
        request = self._request("GET", f"/events/{query}")
        if last_event_id is not None:
            request.headers["Last-Event-ID"] = last_event_id
        return self._stream_plan(request)

    def _generate_stream(
        self, model_id: str, prompt: str, max_length: int, idempotency_key: str | None
    ) -> httpx.Request:
        return self._as_stream(*_generation(model_id, prompt, max_length), idempotency_key)

    def _propose_stream(
        self, prompt: str, max_length: int, idempotency_key: str | None
    ) -> httpx.Request:
        return self._as_stream(*_proposal(prompt, max_length), idempotency_key)

    def _as_stream(
        self, method: str, path: str, body: JSON, idempotency_key: str | None
    ) -> httpx.Request:
        request = self._keyed(method, path, body, idempotency_key)
        request.headers["Accept"] = "text/event-stream"
        return request

    def _stream_plan(self, request: httpx.Request) -> Plan[httpx.Response]:
        request.extensions["timeout"] |= {"read": STREAM_SILENCE}
        return self._core.attempts(request, lambda response: response)


def _generation(model_id: str, prompt: str, max_length: int) -> tuple[str, str, JSON]:
    """Method, path and body."""
    body = {"prompt": prompt, "max_length": max_length, "model_id": model_id}
    return "POST", "/generate/", body


def _proposal(prompt: str, max_length: int) -> tuple[str, str, JSON]:
    """Method, path and body."""
    return "POST", "/propose_trade_adjustments/", {"prompt": prompt, "max_length": max_length}


def _given(**fields: Any) -> JSON:
    return {name: value for name, value in fields.items() if value is not None}


def _checked(idempotency_key: str | None) -> str:
    if idempotency_key is None:
        return str(uuid.uuid4())
    if not re.fullmatch("[!-~]{1,255}", idempotency_key):
        raise ValueError("an idempotency key is 1 to 255 visible ASCII characters")
    return idempotency_key


def _aware(when: datetime) -> datetime:
    return when if when.tzinfo else when.astimezone()


def _read_json(response: httpx.Response) -> JSON:
    try:
        body = response.json()
    except (ValueError, RecursionError) as error:
        raise LLMClientError("the answer is not JSON") from error
    if not isinstance(body, dict):
        raise LLMClientError("the answer is not a JSON object")
    return body


def _read_wav(response: httpx.Response) -> bytes:
    return response.content

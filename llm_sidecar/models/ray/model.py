"""A language model in replicas that Ray Serve runs: `ChatModel` over messages to them.

Ray chooses the replica for each request. If it dies, another one repeats the request, see
`Failover`. Closing a stream stops the generation in the replica. This module does not import Ray:
`osiris.ray_serve` has the `Replicas`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Delta,
    GenerationRequest,
    Message,
    ModelStatus,
    Question,
)
from llm_sidecar.models.failover import Failover, ReplicaLost
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.request_queue import RequestQueue
from llm_sidecar.models.ray.fleet import Fleet, Replicas
from llm_sidecar.models.ray.wire import (
    ANSWER,
    Answer,
    Begun,
    Call,
    Generated,
    Refused,
    Scored,
    encode,
    error_of,
)
from llm_sidecar.telemetry.calls import CallObserver, ModelCall, Observers, Operation, observed


class RayModel(ChatModel):
    """One model in several replicas; see the module's docstring."""

    def __init__(
        self,
        name: str,
        replicas: Replicas,
        *,
        limits: ModelLimits | None = None,
        observer: CallObserver | None = None,
    ) -> None:
        """Contacts nothing.

        Args:
            name: `phi3` or `hermes`.
            replicas: each with the whole model.
            limits: bounds of queue and time.
            observer: receives the start and the end of each call.
        """
        self._name = name
        self._replicas = replicas
        self._limits = limits or ModelLimits()
        self._observer = observer or Observers()
        self._queue = RequestQueue(name, self._limits.queue_length)
        # Requests wait in Ray and in the replicas.
        self._queue.grow(self._limits.queue_length)
        self._fleet = Fleet(name, replicas, self._limits)
        self._closed = False

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Generates; see `ChatModel.stream`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        async with self._call("generate", deadline) as call:
            answers = self._answers(call, deadline, request)
            try:
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        if isinstance(answer, Generated):
                            yield replace(answer.delta, identity=call.identity)
            except TimeoutError:
                if not (allow_partial and call.completion_tokens):
                    raise
                call.finish_reason = "deadline"
                yield Delta.of(call, "")

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        """Scores; see `ChatModel.score_choices`."""
        (scores,) = await self.score_questions([Question(messages, choices)], deadline)
        return scores

    async def score_questions(
        self, questions: Sequence[Question], deadline: Deadline | None = None
    ) -> list[ChoiceScores]:
        """Scores; see `ChatModel.score_questions`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        async with self._call("score_choices", deadline) as call:
            answers = self._answers(call, deadline, questions=questions)
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    if isinstance(answer, Scored):
                        scores = answer.scores
        return scores

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Prefills this prefix in each replica, also in those that start later."""
        await self._fleet.prefill(prefix)

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Changes one replica after the other; see `Fleet.use_adapter`."""
        await self._fleet.use_adapter(adapter)

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts to look at the replicas, which have loaded the adapter in use themselves."""
        self._fleet.start(adapter)

    def status(self) -> ModelStatus:
        """The state at the last look, with the requests of this sidecar."""
        return replace(
            self._fleet.status(),
            requests=self._queue.admitted,
            running=self._queue.running,
            queue_length=self._queue.length,
        )

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, and gives running ones `grace` seconds; the replicas go on."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._queue.idle.wait()
        await self._fleet.close()

    @contextlib.asynccontextmanager
    async def _call(self, operation: Operation, deadline: Deadline) -> AsyncIterator[ModelCall]:
        """Admits and observes a request; turns a TimeoutError into a DeadlineExceeded."""
        with observed(self._observer, ModelCall(self._name, operation)) as call:
            if self._closed:
                raise ModelUnavailable("The server is shutting down; try again.", retry_after=5)
            with self._queue.admit():
                try:
                    async with self._queue.turn(deadline):
                        yield call
                except TimeoutError:
                    raise deadline.exceeded(call, self._queue.retry_after()) from None

    async def _answers(
        self,
        call: ModelCall,
        deadline: Deadline,
        request: GenerationRequest | None = None,
        questions: Sequence[Question] = (),
    ) -> AsyncGenerator[Answer, None]:
        """The answers of one replica after the other, until one has answered all.

        Raises:
            TimeoutError: the deadline passes first.
        """
        failover = Failover(request)
        while True:
            body = Call(
                request=request,
                questions=questions,
                elapsed=time.monotonic() - deadline.began,
                seconds=deadline.seconds,
            )
            messages = self._of_one_replica(call, deadline, encode(body))
            try:
                async with contextlib.aclosing(messages):
                    async for answer in messages:
                        new = _not_given(answer, call, failover)
                        if new is not None:
                            yield new
                return
            except ReplicaLost as error:
                failover.lost(error)

    async def _of_one_replica(
        self, call: ModelCall, deadline: Deadline, body: bytes
    ) -> AsyncGenerator[Answer, None]:
        """What one replica answers, up to its last message.

        Raises:
            ReplicaLost: it ends before that.
        """
        sent = time.monotonic()
        async with contextlib.aclosing(self._replicas.answer(body)) as messages:
            with contextlib.ExitStack() as running:
                while True:
                    async with deadline.timeout():
                        message = await anext(messages, None)
                    if message is None:
                        raise ReplicaLost(f"A replica of {self._name} ended.", retry_after=1)
                    answer: Answer = ANSWER.decode(message)
                    if isinstance(answer, Refused):
                        # It has reached the deadline a moment before this process.
                        if answer.kind == "DeadlineExceeded":
                            raise TimeoutError
                        raise error_of(answer)
                    if isinstance(answer, Begun):
                        running.enter_context(self._queue.run())
                        _note_begin(call, answer, sent)
                    yield answer
                    if _is_final(answer):
                        return


def _not_given(answer: Answer, call: ModelCall, failover: Failover) -> Answer | None:
    """What of an answer is passed on: None for one that a lost replica has already given.

    Raises:
        ReplicaLost: a repetition must not continue on this replica.
    """
    if isinstance(answer, Begun) and not failover.takes(answer.adapter):
        raise ReplicaLost(
            "A replica ended while it answered, and another one has another adapter; try again.",
            retry_after=1,
        )
    if not isinstance(answer, Generated):
        return answer
    delta = answer.delta
    is_last = delta.finish_reason is not None
    text = failover.new_text(delta.text, delta.adapter, is_last=is_last)
    if failover.repeats_text:
        return None
    call.progressed(
        time.monotonic(),
        prompt_tokens=delta.prompt_tokens,
        completion_tokens=delta.completion_tokens,
        cached_tokens=delta.cached_tokens,
        finish_reason=delta.finish_reason,
    )
    return Generated(replace(delta, text=text))


def _note_begin(call: ModelCall, begun: Begun, sent: float) -> None:
    call.served_by, call.adapter, call.identity = begun.model, begun.adapter, begun.identity
    if call.first_token is None:
        # The clock of the replica may be another one.
        call.begun = min(sent + begun.waited, time.monotonic())


def _is_final(answer: Answer) -> bool:
    if isinstance(answer, Generated):
        return answer.delta.finish_reason is not None
    return isinstance(answer, Scored)

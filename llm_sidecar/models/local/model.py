"""A language model on this machine: `ChatModel` over worker processes that hold it.

Requests are served in FIFO order, up to the batch capacity of the workers at a time, each within
its deadline. Closing a stream stops the generation in the worker. A `Supervisor` keeps each worker
running. If one dies, another one repeats its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

import msgspec

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import EngineOptions, TokenLogprob
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.logs import LogFormat
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
from llm_sidecar.models.failover import Failover
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.choice import WorkerChoice
from llm_sidecar.models.local.failures import WorkerLost, error_of
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.loader import WorkerLoader
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.protocol import (
    Answer,
    Begun,
    Check,
    Failed,
    Generate,
    Prefill,
    Progress,
    PromptLogprobs,
    PromptText,
    ScoreQuestions,
    Scores,
    is_final,
)
from llm_sidecar.models.local.replicas import Replicas
from llm_sidecar.models.local.request_queue import RequestQueue
from llm_sidecar.models.local.supervisor import Supervisor
from llm_sidecar.tasks import first_success
from llm_sidecar.telemetry.calls import (
    CallObserver,
    ModelCall,
    Observers,
    Operation,
    WorkerDeath,
    observed,
)

log = logging.getLogger(__name__)


class LocalModel(ChatModel):
    """One model in one or several worker processes; see the module's docstring."""

    def __init__(
        self,
        name: str,
        locate: Callable[[], ModelFiles],
        *,
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        limits: ModelLimits | None = None,
        replicas: int = 1,
        preload: bool = False,
        log_format: LogFormat = "auto",
        observer: CallObserver | None = None,
        on_death: Callable[[WorkerDeath], None] = lambda death: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts nothing.

        Args:
            name: `phi3` or `hermes`.
            locate: finds the files at every load; raises ModelUnavailable.
            options: how it is loaded.
            limits: bounds of queue and time.
            replicas: number of workers, each with the whole model in its memory.
            preload: whether `start` loads the model, which is not ready until then; otherwise the
                first request loads it.
            log_format: of the worker's log lines.
            observer: receives the start and the end of each call.
            on_death: is called with each unexpected end of a worker.
            on_ready: is called when a worker begins to serve, also after a restart or a swap.
        """
        self._limits = limits or ModelLimits()
        self._preload = preload
        self._observer = observer or Observers()
        self._on_death = on_death
        self._on_ready = on_ready
        self._loader = WorkerLoader(name, locate, options, self._limits.load_timeout, log_format)
        supervisors = [self._supervisor() for _ in range(replicas)]
        self._replicas = Replicas(supervisors, self._limits.load_timeout)
        self._queue = RequestQueue(name, self._limits.queue_length)
        self._choice = WorkerChoice()

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Generates; see `ChatModel.stream`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        prompt_text, prompt = "", list[TokenLogprob]()
        with self._call("generate", deadline) as call:
            answers = self._run(call, Generate(request=request), deadline)
            try:
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        if isinstance(answer, PromptText):
                            prompt_text = answer.text
                        elif isinstance(answer, PromptLogprobs):
                            prompt += answer.tokens
                        elif isinstance(answer, Progress):
                            yield Delta.of(
                                call, answer.text, answer.logprobs, tuple(prompt), prompt_text
                            )
                            prompt_text, prompt = "", []
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
        job = ScoreQuestions(questions=questions)
        with self._call("score_choices", deadline) as call:
            async with contextlib.aclosing(self._run(call, job, deadline)) as answers:
                async for answer in answers:
                    if isinstance(answer, Scores):
                        scores = [
                            replace(choice_scores, adapter=call.adapter)
                            for choice_scores in answer.scores
                        ]
        return scores

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Prefills this prefix, now and at each load; requests have priority."""
        self._loader.prefix = prefix
        sent = [worker.send(Prefill(request=prefix)) for worker in self._replicas.live()]
        for _, inbox in sent:
            await inbox.get()

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Switches the adapter; see `ChatModel.use_adapter`.

        A second worker loads the model with the adapter, so no request waits; then the next replica
        switches. Cancelling this call cancels the switch.
        """
        await self._replicas.use_adapter(adapter)

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts to serve with this adapter; loads the model now if it is preloaded."""
        self._replicas.start(adapter)
        if self._preload:
            try:
                self._replicas.load()
            except ModelUnavailable as error:
                log.error("%s", error.detail)

    def status(self) -> ModelStatus:
        """The state now."""
        return replace(
            self._replicas.status(),
            requests=self._queue.admitted,
            running=self._queue.running,
            queue_length=self._queue.length,
        )

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        self._replicas.drain()

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives running ones `grace` seconds to finish, then ends all
        workers."""
        self._replicas.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._queue.idle.wait()
        await self._replicas.close()

    async def _run(
        self, call: ModelCall, job: Generate | ScoreQuestions, deadline: Deadline
    ) -> AsyncGenerator[Answer, None]:
        """Admits a job, yields its answers and records them in the call; closing it cancels the
        job.

        The admission and the turn end with the job, so that a slow reader keeps no other request
        out.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable
            TimeoutError: the deadline passes first.
        """
        self._replicas.check_open()
        with contextlib.ExitStack() as admission:
            admission.enter_context(self._queue.admit())
            self._replicas.load()
            ready_by = self._ready_by(deadline)
            self._replicas.check_waiting(ready_by)
            if self._queue.busy:
                async with deadline.timeout():
                    await self._check(call, job.largest, ready_by)
            async with self._queue.turn(deadline) as turn:
                turn.push(admission)
                answers = self._serve(call, job, deadline, ready_by, turn)
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        _note(call, answer)
                        yield answer

    async def _serve(
        self,
        call: ModelCall,
        job: Generate | ScoreQuestions,
        deadline: Deadline,
        ready_by: float,
        turn: contextlib.ExitStack,
    ) -> AsyncGenerator[Answer, None]:
        """Sends a job to one worker after the other until one has answered it.

        If a worker dies before it begins the job, the next one gets it. If it dies later, another
        one repeats the job, at most once and if `Failover` permits it.
        """
        failover = Failover(job.request if isinstance(job, Generate) else None)
        lost: WorkerLost | None = None
        answered = False
        while not answered:
            async with deadline.timeout():
                workers = await self._workers(ready_by, failover, lost)
            worker = self._choice.choose(workers, job.largest)
            answers = worker.serve(call, job, deadline, on_end=turn.close)
            with contextlib.ExitStack() as running:
                # The job counts as running until the worker ends it, or its reader stops.
                turn.push(running)
                running.enter_context(self._queue.run())
                try:
                    async with contextlib.aclosing(answers):
                        async for answer in answers:
                            answered = is_final(answer)
                            new = _not_given(answer, worker, failover)
                            if new is not None:
                                yield new
                except WorkerLost as error:
                    failover.lost(error)
                    lost = error

    async def _workers(
        self, ready_by: float, failover: Failover, lost: WorkerLost | None
    ) -> list[WorkerProcess]:
        """The workers that may serve a job; waits for a load, but not after a loss."""
        if lost is None:
            return await self._replicas.ready(ready_by)
        workers = [one for one in self._replicas.live() if failover.takes(one.adapter)]
        if not workers:
            raise lost
        return workers

    def _ready_by(self, deadline: Deadline) -> float:
        """How long a new request waits for the model to load, as `time.monotonic` gives it."""
        waits = deadline.remaining()
        if self._limits.load_wait is not None:
            waits = min(waits, self._limits.load_wait)
        return time.monotonic() + waits

    async def _check(self, call: ModelCall, request: GenerationRequest, ready_by: float) -> None:
        """Refuses a prompt that does not fit the context before it waits for its turn."""
        workers = await self._replicas.ready(ready_by)
        # The first answer counts: one of them may hang.
        sent = [worker.send(Check(request=request)) for worker in workers]
        answer = await first_success(*(inbox.get() for _, inbox in sent))
        if isinstance(answer, Failed) and answer.invalid:
            raise error_of(answer, call.model)

    @contextlib.contextmanager
    def _call(self, operation: Operation, deadline: Deadline) -> Iterator[ModelCall]:
        """Observes a request; a TimeoutError becomes the error that says why."""
        with observed(self._observer, ModelCall(self._loader.name, operation)) as call:
            try:
                yield call
            except TimeoutError:
                if call.begun is None and (error := self._replicas.load_error()) is not None:
                    raise error from None
                raise deadline.exceeded(call, self._queue.retry_after()) from None

    def _supervisor(self) -> Supervisor:
        return Supervisor(
            self._loader,
            self._limits,
            preload=self._preload,
            on_death=self._report_death,
            on_ready=self._report_ready,
        )

    def _report_ready(self) -> None:
        self._queue.grow(self._replicas.capacity())
        self._on_ready()

    def _report_death(self, worker: WorkerProcess) -> None:
        call = next(iter(worker.calls.values()), None)
        how = worker.how_it_ended()
        self._on_death(WorkerDeath(self._loader.name, worker.adapter, how, call))


def _not_given(answer: Answer, worker: WorkerProcess, failover: Failover) -> Answer | None:
    """The new part of an answer; None if a lost worker has already given out all of it."""
    if isinstance(answer, PromptText | PromptLogprobs):
        failover.new_text("", worker.adapter)
    if not isinstance(answer, Progress):
        return answer
    text = failover.new_text(answer.text, worker.adapter, is_last=is_final(answer))
    return None if failover.repeats_text else msgspec.structs.replace(answer, text=text)


def _note(call: ModelCall, answer: Answer) -> None:
    """Records the times and counts of an answer in the call."""
    if isinstance(answer, Begun) and call.first_token is None:
        call.begun = answer.at
    elif isinstance(answer, Progress):
        call.progressed(
            answer.at,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            finish_reason=answer.finish_reason,
        )

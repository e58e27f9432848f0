"""A language model on this machine: `ChatModel` over a worker process that holds it.

Requests are served in FIFO order, up to the worker's batch capacity at a time, each within its
deadline. Closing a stream stops the generation in the worker, which a `Supervisor`
keeps running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

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
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.failures import error_of
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.loader import WorkerLoader
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.protocol import (
    Answer,
    Begun,
    Check,
    Died,
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
from llm_sidecar.models.local.request_queue import RequestQueue
from llm_sidecar.models.local.supervisor import Supervisor
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
    """One model in a worker process; see the module's docstring."""

    def __init__(
        self,
        name: str,
        locate: Callable[[], ModelFiles],
        *,
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        limits: ModelLimits | None = None,
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
        self._loader = WorkerLoader(name, locate, options, self._limits.load_timeout, log_format)
        self._supervisor = Supervisor(
            self._loader,
            self._limits,
            preload=preload,
            on_death=self._report_death,
            on_ready=on_ready,
        )
        self._queue = RequestQueue(name, self._limits.queue_length)

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
        if (worker := self._supervisor.slot.live_worker) is not None:
            _, inbox = worker.send(Prefill(request=prefix))
            await inbox.get()

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Switches the adapter; see `ChatModel.use_adapter`.

        A second worker loads the model with the adapter, so no request waits. Cancelling this call
        cancels the switch.
        """
        await self._supervisor.use_adapter(adapter)

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts to serve with this adapter; loads the model now if it is preloaded."""
        self._supervisor.adapter = adapter
        if self._preload:
            try:
                self._supervisor.start()
            except ModelUnavailable as error:
                log.error("%s", error.detail)

    def status(self) -> ModelStatus:
        """The state now."""
        return replace(
            self._supervisor.status(),
            requests=self._queue.admitted,
            running=self._queue.running,
            queue_length=self._queue.length,
        )

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        self._supervisor.drain()

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives running ones `grace` seconds to finish, then ends all
        workers."""
        self._supervisor.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._queue.idle.wait()
        await self._supervisor.close()

    async def _run(
        self, call: ModelCall, job: Generate | ScoreQuestions, deadline: Deadline
    ) -> AsyncGenerator[Answer, None]:
        """Admits a job, yields its answers and records them in the call; closing it cancels the
        job.

        A job whose worker dies before it begins goes to the next worker. The admission and the turn
        end with the job, so that a slow reader keeps no other request out.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable
            TimeoutError: the deadline passes first.
        """
        self._supervisor.check_open()
        with contextlib.ExitStack() as admission:
            admission.enter_context(self._queue.admit())
            self._supervisor.start()
            ready_by = self._ready_by(deadline)
            self._supervisor.check_waiting(ready_by)
            if self._queue.busy:
                async with deadline.timeout():
                    await self._check(call, job.largest, ready_by)
            async with self._queue.turn(deadline) as turn:
                turn.push(admission)
                answered = False
                while not answered:
                    async with deadline.timeout():
                        worker = await self._supervisor.ready(ready_by)
                    served = self._serve(worker, call, job, deadline, turn)
                    async with contextlib.aclosing(served) as answers:
                        async for answer in answers:
                            answered = is_final(answer)
                            yield answer

    def _ready_by(self, deadline: Deadline) -> float:
        """How long a new request waits for the model to load, as `time.monotonic` gives it."""
        waits = deadline.remaining()
        if self._limits.load_wait is not None:
            waits = min(waits, self._limits.load_wait)
        return time.monotonic() + waits

    async def _check(self, call: ModelCall, request: GenerationRequest, ready_by: float) -> None:
        """Refuses a prompt that does not fit the context before it waits for its turn."""
        worker = await self._supervisor.ready(ready_by)
        _, inbox = worker.send(Check(request=request))
        answer = await inbox.get()
        if isinstance(answer, Failed) and answer.invalid:
            raise error_of(answer, call.model)

    async def _serve(
        self,
        worker: WorkerProcess,
        call: ModelCall,
        job: Generate | ScoreQuestions,
        deadline: Deadline,
        turn: contextlib.ExitStack,
    ) -> AsyncGenerator[Answer, None]:
        """Sends a job to one worker and yields its answers: none if it dies before it begins."""
        assert worker.ready is not None
        self._queue.grow(worker.ready.capacity)
        call.served_by, call.adapter = worker.label, worker.adapter
        call.identity = worker.ready.identity
        number, inbox = worker.send(job)
        worker.calls[number] = call
        answer: Answer | None = None
        running = contextlib.ExitStack()
        running.enter_context(self._queue.run())
        turn.push(running)

        def ended() -> None:
            worker.calls.pop(number, None)
            turn.close()

        inbox.on_end = ended
        try:
            async with contextlib.aclosing(inbox.answers(deadline)) as answers:
                async for answer in answers:
                    _note(call, answer)
                    if not isinstance(answer, Failed | Died):
                        yield answer
        finally:
            running.close()
            if not isinstance(answer, Died):
                worker.calls.pop(number, None)
            if answer is None or not is_final(answer):
                worker.cancel(number, inbox)
        if isinstance(answer, Failed) or (isinstance(answer, Died) and call.begun is not None):
            raise error_of(answer, call.model)

    @contextlib.contextmanager
    def _call(self, operation: Operation, deadline: Deadline) -> Iterator[ModelCall]:
        """Observes a request; a TimeoutError becomes the error that says why."""
        with observed(self._observer, ModelCall(self._loader.name, operation)) as call:
            try:
                yield call
            except TimeoutError:
                if call.begun is None and not self._supervisor.load_state.is_ready:
                    raise self._supervisor.load_state.error() from None
                raise deadline.exceeded(call, self._queue.retry_after()) from None

    def _report_death(self, worker: WorkerProcess) -> None:
        call = next(iter(worker.calls.values()), None)
        how = worker.how_it_ended()
        self._on_death(WorkerDeath(self._loader.name, worker.adapter, how, call))


def _note(call: ModelCall, answer: Answer) -> None:
    """Records the times and counts of an answer in the call."""
    if isinstance(answer, Begun):
        call.begun = answer.at
    elif isinstance(answer, Progress):
        call.progressed(
            answer.at,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            finish_reason=answer.finish_reason,
        )

"""The scores that a worker computes."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Generator

from llm_sidecar.engines.base import ChoiceScores, Engine
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.local.failures import failed
from llm_sidecar.models.local.outbox import Outbox, ending_without_server
from llm_sidecar.models.local.protocol import Answer, Done, Failed, ScoreQuestions, Scores

_Steps = Generator[None, None, list[ChoiceScores]]


class ScoreJobs:
    """Computes scores step by step, or each in a thread of its own if the engine can."""

    def __init__(self, outbox: Outbox) -> None:
        """Args: outbox: receives the answers."""
        self._outbox = outbox
        self._stepped: dict[int, _Steps] = {}
        self._parallel: set[int] = set()

    def __len__(self) -> int:
        """The number of scores that wait for `step`."""
        return len(self._stepped)

    def begin(self, engine: Engine, job: ScoreQuestions) -> None:
        """Takes the first step of a score, or starts its thread."""
        if self._outbox.end_cancelled(job.id):
            return
        steps = engine.score_questions(job.questions)
        if engine.scores_in_parallel:
            self._parallel.add(job.id)
            threading.Thread(target=self._run, args=(job.id, steps), daemon=True).start()
        else:
            self._stepped[job.id] = steps
            # A score with one step does not wait for the batch.
            self._continue(job.id)

    def step(self) -> None:
        """Takes the next step of each score."""
        for number in tuple(self._stepped):
            self._continue(number)

    def cancel(self, number: int) -> bool:
        """Ends a score that has a thread; returns whether there was one."""
        return self._end(Done(id=number))

    def _continue(self, number: int) -> None:
        """Takes the next step of a score, and sends the result after the last one."""
        steps = self._stepped[number]
        if self._outbox.end_cancelled(number):
            steps.close()
        elif (answer := _next_step(number, steps)) is not None:
            self._outbox.send(answer)
            self._outbox.cancelled.discard(number)
        else:
            return
        del self._stepped[number]

    def _run(self, number: int, steps: _Steps) -> None:
        with contextlib.closing(steps), ending_without_server():
            while number in self._parallel:
                if (answer := _next_step(number, steps)) is not None:
                    self._end(answer)

    def _end(self, answer: Answer) -> bool:
        """Sends the answer unless the job has ended; returns whether it was sent."""
        try:
            # Of two threads, only one can remove it.
            self._parallel.remove(answer.id)
        except KeyError:
            return False
        self._outbox.send(answer)
        return True


def _next_step(number: int, steps: _Steps) -> Scores | Failed | None:
    """The answer to the job if this was its last step, else None."""
    try:
        next(steps)
    except StopIteration as end:
        scores: list[ChoiceScores] = end.value
        values = (value for each in scores for value in each.probabilities.values())
        if all(map(math.isfinite, values)):
            return Scores(id=number, scores=scores)
        # JSON has no infinity and no NaN.
        return failed(number, ModelUnavailable("its probabilities are not finite numbers"))
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare exceptions
        return failed(number, error)
    return None

"""Stand-ins at the seams: a model that answers what a test tells it to, a module's fresh copy."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

from llm_sidecar.services.archive import Archive
from llm_sidecar.services.examples import Outcome

from llm_sidecar.db import Correction
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest, Message
from llm_sidecar.event_bus import EventBus
from llm_sidecar.models.local.model import Completion, ModelHost
from llm_sidecar.proposals import Example
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.telemetry.metrics import NoMetrics


def completion(text: str, **changes: object) -> Completion:
    """A finished generation by `phi3/fake`, unless the changes say otherwise."""
    values: dict[str, object] = {
        "model": "phi3/fake",
        "adapter": None,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 9,
    }
    return Completion(text=text, **(values | changes))  # type: ignore[arg-type]


class FakeHost:
    """A model that answers in order what it was given, and keeps what it was asked.

    Attributes:
        answers: completions, probabilities, or errors to raise; the first is for the next request.
        asked: generation requests, and the (messages, answers) of scores.
        deadlines: of the requests; None for one without.
        partial: whether part of an answer would do, of each generation request.
        before_answer: is called before each answer.
    """

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[object] = []
        self.deadlines: list[Deadline | None] = []
        self.partial: list[bool] = []
        self.before_answer: Callable[[], None] = lambda: None

    async def generate(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> Completion:
        self.asked.append(request)
        self.deadlines.append(deadline)
        self.partial.append(allow_partial)
        return cast(Completion, self._next())

    async def answer_probabilities(
        self,
        messages: Sequence[Message],
        answers: Sequence[str],
        deadline: Deadline | None = None,
    ) -> dict[str, float]:
        self.asked.append((messages, answers))
        self.deadlines.append(deadline)
        return cast(dict[str, float], self._next())

    def _next(self) -> object:
        self.before_answer()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def host(self) -> ModelHost:
        """Itself, as those that ask models know one."""
        return cast(ModelHost, self)


class Happened:
    """What happens around a sidecar, in order.

    Attributes:
        log: (`row`, the name of its class, its columns), (`event`, its channel, its payload),
            (`refusal`, a channel, the reason), (`metric`, its name, its value) and
            (`archive`, what was asked of it, of what).
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []

    def of(self, kind: str) -> list[tuple[str, Any]]:
        """The names and contents of one kind, in order."""
        return [(name, content) for happened, name, content in self.log if happened == kind]


class FakeBus:
    """Takes every event."""

    def __init__(self, happened: Happened) -> None:
        self._happened = happened

    async def publish(self, channel: str, payload: str) -> bool:
        self._happened.log.append(("event", channel, json.loads(payload)))
        return True

    def refuse(self, channel: str, reason: str) -> None:
        self._happened.log.append(("refusal", channel, reason))


class FakeArchive:
    """Takes every row, or refuses all.

    Attributes:
        corrections: the few-shot examples in use, oldest first.
        examples: as a prompt has them.
        failure: raised instead of taking a row.
        outcome: what is said of feedback.
        known: feedback that can be withdrawn.
        database_id: the database's own name, once that is known.
    """

    def __init__(self, happened: Happened) -> None:
        self._happened = happened
        self.corrections: tuple[Correction, ...] = ()
        self.examples: tuple[Example, ...] = ()
        self.failure: Exception | None = None
        self.outcome = Outcome.NO_CORRECTION
        self.known: set[str] = set()
        self.database_id: str | None = None

    async def append(self, row: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self._happened.log.append(("row", type(row).__name__, row.as_row()))

    async def append_feedback(self, row: Any) -> Outcome:
        await self.append(row)
        return self.outcome

    async def append_published(self, row: Any) -> None:
        await self.append(row)

    async def withdraw(self, feedback_id: str) -> bool:
        self._happened.log.append(("archive", "withdraw", feedback_id))
        return feedback_id in self.known

    def refresh_soon(self) -> None:
        self._happened.log.append(("archive", "refresh_soon", None))


class FakeMetrics(NoMetrics):
    """Notes proposals, scores and lost rows."""

    def __init__(self, happened: Happened) -> None:
        self._happened = happened

    def proposed(self, action: str, ungrounded: Sequence[str]) -> None:
        self._happened.log.append(("metric", "proposed", (action, *ungrounded)))

    def scored(self, score: float) -> None:
        self._happened.log.append(("metric", "scored", score))

    def row_lost(self, table: str) -> None:
        self._happened.log.append(("metric", "row_lost", table))


class FakeParts:
    """A sidecar whose models, database and event bus are fakes.

    Attributes:
        sidecar: the real one.
        phi3, hermes: its models.
        archive: its database.
        happened: rows, events and metrics, in order.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.happened = Happened()
        self.phi3, self.hermes = FakeHost(), FakeHost()
        self.archive = FakeArchive(self.happened)
        settings = settings or Settings.from_environ({"REDIS_URL": "memory://"})
        self.sidecar = Sidecar(settings, FakeMetrics(self.happened))
        self.sidecar.phi3, self.sidecar.hermes = self.phi3.host, self.hermes.host
        self.sidecar.bus = cast(EventBus, FakeBus(self.happened))
        self.sidecar.archive = cast(Archive, self.archive)


def fresh(module: ModuleType) -> ModuleType:
    """The module executed once more: what it computes while it is imported is computed now.

    The one that everybody imports stays as it is.
    """
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert sys.modules[module.__name__] is module
    return again

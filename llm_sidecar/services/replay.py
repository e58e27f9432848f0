"""Generates a stored proposal again, and finds what differs.

The critique and the score are generated for the stored proposal, so they do not depend on the new
one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llm_sidecar import __version__, hermes_plugin, proposals
from llm_sidecar.db import Correction
from llm_sidecar.deadline import Deadline
from llm_sidecar.models import adapters
from llm_sidecar.models.base import Adapter, ChatModel, Completion, GenerationRequest, Models
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.proposals import Example
from llm_sidecar.services.critique import Deltas, whole_sentences
from llm_sidecar.services.provenance import (
    Generated,
    Provenance,
    critique_prompt_version,
    proposal_prompt_version,
)
from llm_sidecar.settings import Settings

_SCORE_TOLERANCE: Final = 1e-4
"""Maximum difference of two scores that count as the same."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A stored proposal.

    Attributes:
        prompt: the market context.
        proposal: as JSON types.
        critique: Hermes' text; empty without one.
        score: in [0, 1], or None.
        provenance: its provenance.
        examples: its few-shot examples that are still stored, by feedback_id.
    """

    prompt: str
    proposal: dict[str, Any]
    critique: str
    score: float | None
    provenance: Provenance
    examples: Mapping[str, Correction]


@dataclass(frozen=True, slots=True)
class Result:
    """A stored result, and that of the replay: two texts, or two scores."""

    then: str | float
    now: str | float

    @property
    def same(self) -> bool:
        """Whether the texts are equal, or the scores nearly equal."""
        if isinstance(self.then, str) or isinstance(self.now, str):
            return self.then == self.now
        return abs(self.then - self.now) <= _SCORE_TOLERANCE


@dataclass(frozen=True, slots=True)
class Difference:
    """A recorded fact with another value now; None for an absent value."""

    fact: str
    then: str | None
    now: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a replay.

    Attributes:
        results: `proposal`; `critique` and `score` too if they are stored.
        differences: the recorded facts that differ now.
    """

    results: dict[str, Result]
    differences: list[Difference]

    @property
    def same(self) -> bool:
        """Whether every result is the same."""
        return all(result.same for result in self.results.values())


async def replay(recorded: Recorded, models: Models, settings: Settings) -> Report:
    """Generates proposal, critique and score again, with the recorded sampling and examples.

    Args:
        models: neither is started; they are loaded one after the other, to save memory.
        settings: of the sidecar now.

    Raises:
        InvalidRequest, ModelUnavailable, DeadlineExceeded: a model does not answer.
    """
    provenance = recorded.provenance
    differences = _compared("sidecar", provenance.sidecar, __version__)
    report = Report({}, [*differences, *_examples_missing(recorded)])
    await _propose_again(report, recorded, models.phi3, settings)
    if provenance.critique is not None:
        await _judge_again(report, recorded, provenance.critique, models.hermes, settings)
    return report


async def _propose_again(
    report: Report, recorded: Recorded, phi3: ChatModel, settings: Settings
) -> None:
    then, request = recorded.provenance.proposal, _proposal_request(recorded)
    async with _started(phi3, _recorded_adapter(settings, then.adapter)):
        completion = await _completed(phi3, request, settings)
    written = proposals.dumps(proposals.in_order(recorded.proposal))
    report.results["proposal"] = Result(written, _normal(completion.text))
    now = Generated.of(request, completion, proposal_prompt_version())
    report.differences.extend(_differences("phi3", then, now, settings.models.phi3_temperature))


async def _judge_again(
    report: Report, recorded: Recorded, then: Generated, hermes: ChatModel, settings: Settings
) -> None:
    prompts = hermes_plugin.prompts_for(settings)
    request = _critique_request(recorded, then, prompts)
    async with _started(hermes, None):
        completion = await _completed(hermes, request, settings, whole_sentences)
        report.results["critique"] = Result(recorded.critique, completion.text)
        if recorded.score is not None:
            score = await _score(hermes, recorded, prompts)
            report.results["score"] = Result(recorded.score, score)
    now = Generated.of(request, completion, critique_prompt_version(prompts))
    report.differences.extend(_differences("hermes", then, now, settings.models.hermes_temperature))


def _proposal_request(recorded: Recorded) -> GenerationRequest:
    then = recorded.provenance.proposal
    found = [recorded.examples.get(name) for name in recorded.provenance.examples]
    examples = [Example(one.prompt, one.proposal) for one in found if one is not None]
    messages = proposals.build_messages(recorded.prompt, examples)
    most = then.max_tokens
    guidance = None if then.guidance is None else then.guidance.text(recorded.prompt, most)
    guidance = guidance or proposals.guidance(most)
    return GenerationRequest(messages, most, guidance, then.temperature, then.seed)


def _critique_request(recorded: Recorded, then: Generated, prompts: Prompts) -> GenerationRequest:
    messages = hermes_plugin.build_messages(
        prompts.critique_task, recorded.proposal, recorded.prompt, prompts.system
    )
    return GenerationRequest(
        messages, then.max_tokens, temperature=then.temperature, seed=then.seed
    )


def _recorded_adapter(settings: Settings, name: str | None) -> Adapter | None:
    """The adapter with exactly this name; None if it no longer exists."""
    if name is None:
        return None
    folder = settings.models.adapter_dir / name
    known = folder.name == name and adapters.adapter_date(folder) is not None
    return Adapter(folder) if known and adapters.holds_adapter(folder) else None


@contextlib.asynccontextmanager
async def _started(model: ChatModel, adapter: Adapter | None) -> AsyncIterator[None]:
    await model.start(adapter)
    try:
        yield
    finally:
        await model.close()


async def _completed(
    model: ChatModel,
    request: GenerationRequest,
    settings: Settings,
    cut: Callable[[Deltas], Deltas] = lambda stream: stream,
) -> Completion:
    deadline = Deadline.after(settings.models.load_timeout + settings.limits.request_timeout)
    async with contextlib.aclosing(cut(model.stream(request, deadline))) as stream:
        return Completion.of([delta async for delta in stream])


async def _score(hermes: ChatModel, recorded: Recorded, prompts: Prompts) -> float:
    messages = hermes_plugin.score_messages(recorded.proposal, recorded.prompt, prompts)
    scores = await hermes.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    return hermes_plugin.read_score(scores)


def _normal(text: str) -> str:
    """The text as a stored proposal is written; unchanged if it is not a proposal."""
    try:
        return proposals.dumps(proposals.in_order(proposals.parse(text)))
    except ValueError:
        return text


def _examples_missing(recorded: Recorded) -> list[Difference]:
    missing = [name for name in recorded.provenance.examples if name not in recorded.examples]
    return [Difference(f"example {name}", "in the chat", "not stored") for name in missing]


def _differences(
    name: str, then: Generated, now: Generated, temperature: float | None
) -> list[Difference]:
    """The facts about one model's text that differ.

    Args:
        temperature: that of the settings; the replay itself uses the recorded one.
    """
    if then.identity is None:
        now = now.model_copy(update={"identity": None})
    before, after = _facts(then), _facts(now)
    after["temperature"] = temperature
    found: list[Difference] = []
    for fact in {**before, **after}:
        found += _compared(f"{name} {fact}", before.get(fact), after.get(fact))
    return found


def _facts(generated: Generated) -> dict[str, Any]:
    identity = generated.identity or ModelIdentity()
    return {
        "model": generated.label,
        "adapter": generated.adapter,
        "model files": identity.model_files,
        "adapter files": identity.adapter_files,
        "tokenizer files": identity.tokenizer_files,
        "runtime": identity.runtime,
        **{f"version of {name}": version for name, version in identity.versions.items()},
        "device": identity.device,
        "processor": identity.processor,
        "threads": identity.threads,
        "precision": identity.dtype,
        "prefill files": identity.prefill_files,
        "prompt version": generated.prompt_version,
        "chat": generated.chat,
        "guidance": None if generated.guidance is None else generated.guidance.version,
        "temperature": generated.temperature,
    }


def _compared(fact: str, then: object, now: object) -> list[Difference]:
    if then == now:
        return []
    before, after = (None if value is None else str(value) for value in (then, now))
    return [Difference(fact, before, after)]

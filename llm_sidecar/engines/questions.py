"""Several questions to one model: the logits that their answers need, and the scores from these.

Most questions are about the same text, so that their prompts have a common prefix. An engine
processes the prefix once, and then only the end of each prompt.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from llm_sidecar.engines.base import ChoiceScores
from llm_sidecar.engines.choice_tree import ChoiceTree, shared_length
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.generation import Logits
from llm_sidecar.engines.prefixes import UNSHARED


class Asked(NamedTuple):
    """A question as tokens.

    Attributes:
        prompt: of its chat.
        tree: of its choices, after the prompt.
    """

    prompt: list[int]
    tree: ChoiceTree

    def reads(self) -> list[Read]:
        """The logits that its answer needs; each takes a forward pass."""
        kept = self.prompt[: len(self.prompt) - self.tree.replaced]
        return [Read(kept, path) for path in self.tree.paths]


class Read(NamedTuple):
    """Tokens whose logits are needed: those after the prompt, and after each token of the path."""

    prompt: list[int]
    path: tuple[int, ...]


class Found(NamedTuple):
    """The result of a forward pass.

    Attributes:
        logits: (1 + tokens of the path, vocabulary).
        cached: the number of prompt tokens that were not processed for it.
    """

    logits: Logits
    cached: int


class Batches(NamedTuple):
    """How to compute reads in a batch.

    Attributes:
        prefix: the tokens that all prompts begin with.
        size: the maximum number of tokens of a row.
        rows: the number of reads in a forward pass.
    """

    prefix: list[int]
    size: int
    rows: int


def plan_batches(reads: Sequence[Read], batch_capacity: int, context_length: int) -> Batches | None:
    """How to compute several reads in each forward pass; None to compute one after the other.

    A pass has at most `PREFILL_CHUNK` tokens, like a step of a prefill, so that other requests do
    not wait longer. Each row has a copy of the prefix, and all rows fit into two contexts.
    """
    first = reads[0].prompt
    shared = min(shared_length(first, read.prompt) for read in reads)
    shared = min(shared, *(len(read.prompt) - UNSHARED for read in reads))
    longest = max(len(read.prompt) for read in reads) - shared
    size = max(len(read.prompt) + len(read.path) for read in reads)
    rows = min(batch_capacity, PREFILL_CHUNK // longest, 2 * context_length // size, len(reads))
    if rows < 2 or shared <= UNSHARED:
        return None
    return Batches(first[:shared], size, rows)


def scores_of(
    asked: Sequence[Asked], results: Iterator[Found | None]
) -> Generator[None, None, list[ChoiceScores]]:
    """The scores of each question, step by step.

    Args:
        asked: the questions.
        results: of the reads of all questions, in order, with None after each step.
    """
    scores: list[ChoiceScores] = []
    for one in asked:
        if scores:
            yield
        found: list[Found] = []
        while len(found) < len(one.tree.paths):
            result = next(results)
            if result is None:
                yield
            else:
                found.append(result)
        probabilities = one.tree.read([each.logits for each in found])
        scores.append(ChoiceScores(probabilities, len(one.prompt), found[0].cached))
    return scores

"""The inbox of a job: answers in order, and bounded for a slow reader."""

from __future__ import annotations

import asyncio

from llm_sidecar.engines.base import FinishReason, TokenLogprob
from llm_sidecar.models.local.inbox import Inbox
from llm_sidecar.models.local.protocol import (
    Answer,
    Begun,
    Died,
    Done,
    Failed,
    Progress,
    PromptLogprobs,
    PromptText,
)

ONE, TWO = TokenLogprob(1, b"a", -0.5), TokenLogprob(2, b"b", -0.25)


def progress(
    text: str, tokens: int, reason: FinishReason | None = None, *logprobs: TokenLogprob
) -> Progress:
    return Progress(
        id=7,
        at=float(tokens),
        text=text,
        prompt_tokens=3,
        completion_tokens=tokens,
        cached_tokens=1,
        new_tokens=1,
        finish_reason=reason,
        logprobs=logprobs,
    )


async def test_progress_that_was_read_stays_as_it_is() -> None:
    inbox = Inbox()
    for answer in (progress("a", 1), progress("b", 2)):
        inbox.put_nowait(answer)
        assert await inbox.get() is answer


async def test_progress_that_waits_is_joined() -> None:
    inbox = Inbox()
    begun = Begun(id=7, at=0.0)
    inbox.put_nowait(begun)
    inbox.put_nowait(progress("a", 1, None, ONE))
    inbox.put_nowait(progress("b", 2, None, TWO))
    inbox.put_nowait(progress("c", 3, "stop"))
    assert await inbox.get() is begun
    assert await inbox.get() == Progress(
        id=7,
        at=3.0,
        text="abc",
        prompt_tokens=3,
        completion_tokens=3,
        cached_tokens=1,
        new_tokens=3,
        finish_reason="stop",
        logprobs=(ONE, TWO),
    )


async def test_a_reader_that_waits_gets_the_next_answer() -> None:
    inbox = Inbox()
    reading = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    assert not reading.done()
    answer = progress("a", 1)
    inbox.put_nowait(answer)
    assert await reading is answer


async def test_the_end_of_a_job_is_known_before_it_is_read() -> None:
    ends = (progress("a", 1, "length"), Done(id=7), Failed(id=7, detail="no"))
    others: tuple[Answer, ...] = (
        Begun(id=7),
        PromptText(id=7, text="a"),
        PromptLogprobs(id=7, tokens=(ONE,)),
        progress("a", 1),
        # The job goes to the next worker, or its caller gets an error.
        Died(id=7, how="signal SIGKILL"),
    )
    for answers, expected in ((ends, [1, 2, 3]), (others, [])):
        inbox, ended = Inbox(), list[int]()
        inbox.on_end = lambda ended=ended: ended.append(len(ended) + 1)  # type: ignore[misc]
        for answer in answers:
            inbox.put_nowait(answer)
        assert ended == expected

"""A process that stores feedback in a database, as one of several machines; see `main`."""

from __future__ import annotations

import asyncio
import sys

from llm_sidecar.db import FEEDBACK, PublishedFeedback, Store
from llm_sidecar.db.transaction import Transaction


async def main(uri: str, count: int, batches: int) -> None:
    """Opens the database, says so, waits for a line, and stores the same feedback as every other
    process, in several batches.

    Args:
        uri: of the database; `LANCEDB_LOG_DIR` is this machine's own.
        count: rows in total, with the ids 0 to count - 1.
    """
    store = await Store.open(uri)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    for batch in range(batches):
        await asyncio.gather(
            *(store.commit(Transaction([_feedback(n)])) for n in range(batch, count, batches))
        )
        # Moves them.
        await store.last(FEEDBACK, 1)
    await store.close()


def _feedback(number: int) -> PublishedFeedback:
    return PublishedFeedback(
        feedback_id=str(number),
        transaction_id="t",
        feedback_type="rating",
        feedback_content="5",
    )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

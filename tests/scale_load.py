"""Load for two sidecars: proposals, feedback and events, and how often each is stored.

The client is the one that services use: it sends a request again, with the same `Idempotency-Key`,
after an error that may pass.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lancedb
from redis import Redis

from osiris.llm_client import LLMClient
from tests.redis_server import entries
from tests.scale_cluster import NAMES, TwoSidecars
from tests.unit.services.samples import PROMPT

CHANNEL, INBOX = "phi3.feedback.submitted", "osiris.inbox"


class Load:
    """Proposals, each with feedback over HTTP, over the channel, and over the inbox.

    Args:
        two: the sidecars, which are asked through the proxy.
        clients: the number of requests at a time.
        inbox: whether entries go to the inbox. Those that a killed sidecar has read are claimed
            after a minute.

    Attributes:
        answered: the `transaction_id` of each proposal.
    """

    def __init__(self, two: TwoSidecars, *, clients: int, inbox: bool = True) -> None:
        self.answered: list[str] = []
        self._two = two
        self._clients = clients
        self._kinds = ("channel", "inbox") if inbox else ("channel",)
        self._name = uuid.uuid4().hex

    def run(self, count: int, *, halfway: Callable[[], object] = lambda: None) -> None:
        """Sends `count` proposals, and the feedback; raises the first error of a client.

        Args:
            halfway: is called after half of them, while the others run.
        """
        with (
            LLMClient(self._two.proxy.url, retries=8) as client,
            Redis(port=self._two.redis.port, decode_responses=True) as redis,
            ThreadPoolExecutor(self._clients) as threads,
        ):
            futures = [threads.submit(self._send, client, redis, number) for number in range(count)]
            for future in futures[: count // 2]:
                future.result()
            halfway()
            for future in futures[count // 2 :]:
                future.result()

    def _send(self, client: LLMClient, redis: Redis, number: int) -> None:
        transaction_id = client.propose_trade_adjustments(PROMPT)["transaction_id"]
        client.submit_feedback(transaction_id, "rating", "4")
        redis.publish(CHANNEL, self._feedback("channel", number))
        if "inbox" in self._kinds:
            fields: dict[Any, Any] = {"id": f"{self._name}-{number}", "type": CHANNEL}
            redis.xadd(INBOX, fields | {"data": self._feedback("inbox", number)})
        self.answered.append(transaction_id)

    def _feedback(self, kind: str, number: int) -> str:
        values = {"feedback_type": "rating", "feedback_content": "3"}
        return json.dumps(values | {"transaction_id": f"{kind}-{self._name}-{number}"})

    def expected_feedback(self) -> Counter[str]:
        """The transactions of all feedback that was sent, each once."""
        others = [
            f"{kind}-{self._name}-{number}"
            for kind in self._kinds
            for number in range(len(self.answered))
        ]
        return Counter([*self.answered, *others])


class Stored:
    """What the database and the stream of events of two sidecars have."""

    def __init__(self, two: TwoSidecars) -> None:
        self._two = two

    def settle(self, load: Load, seconds: float = 30.0) -> None:
        """Waits until all feedback of a load is stored, and ends the sidecars: they move their rows
        to the database, except drafts, and send their events first."""
        expected = load.expected_feedback().keys()

        def is_stored() -> bool:
            return expected <= self.column("phi3_feedback", "transaction_id").keys()

        # What came over the channel or the inbox may wait for the sidecar that has received it.
        self._two["b"].wait_until(is_stored, seconds, interval=0.5)
        for name in NAMES:
            assert self._two.stop(name) == 0

    def assert_once(self, load: Load, count: int) -> None:
        """Asserts that all of a load is stored once: nothing is lost, nothing is doubled."""
        once = Counter(load.answered)
        assert (len(once), set(once.values())) == (count, {1})
        wrong = {}
        for table, name, expected in (
            ("orchestrator_runs", "run_id", once),
            ("proposals", "transaction_id", once),
            ("hermes_scores", "run_id", once),
            ("phi3_feedback", "transaction_id", load.expected_feedback()),
        ):
            wrong[table] = self._wrong(self.column(table, name), expected)
        for kind, name in (
            ("phi3.proposal.created", "transaction_id"),
            ("phi3.proposal.assessed", "proposal_transaction_id"),
            # Of the feedback that came over HTTP.
            (CHANNEL, "transaction_id"),
        ):
            wrong[kind] = self._wrong(self.events(kind, name), once)
        assert not any(wrong.values()), wrong

    def _wrong(self, found: Counter[str], expected: Counter[str]) -> dict[str, int]:
        return {name: found[name] for name in expected if found[name] != expected[name]}

    def column(self, table: str, name: str) -> Counter[str]:
        """How often each value of a column is in a table."""
        environ = self._two.environ
        options = {
            "endpoint": environ["AWS_ENDPOINT_URL"],
            "allow_http": "true",
            "aws_access_key_id": environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": environ["AWS_SECRET_ACCESS_KEY"],
            "region": environ["AWS_DEFAULT_REGION"],
        }
        rows = lancedb.connect(self._two.database, storage_options=options).open_table(table)
        return Counter(rows.to_arrow()[name].to_pylist())

    def events(self, kind: str, name: str) -> Counter[str]:
        """How often each value of a field is among the events of a type.

        An event that is sent again has the same id, and counts once.
        """
        with Redis(port=self._two.redis.port, decode_responses=True) as redis:
            found = entries(redis, "osiris.events")
        once = {fields["id"]: fields["data"] for _, fields in found if fields["type"] == kind}
        return Counter(json.loads(data)[name] for data in once.values())

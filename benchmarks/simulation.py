"""How many requests replicas of a model serve: a formula, and a simulation with queueing.

    replica = Replica(prefill=500.0, steps=(0.020, 0.024), threads=1)
    simulate(Workload(clients=16, requests=320), replica, Machine(cores=8), replicas=4)

A replica generates a batch: each step gives every request of the batch one token. Requests join
between two steps, with their prefill, up to the capacity. One queue gives each request to the least
busy replica with a free place. The API process does its work for one request after the other.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Replica:
    """How fast one replica is, alone on its cores.

    Attributes:
        prefill: prompt tokens per second.
        steps: seconds of one step with 1, 2, ... requests in the batch, up to its capacity.
        threads: cores that it keeps busy; 0 if it only waits.
    """

    prefill: float
    steps: tuple[float, ...]
    threads: int

    @property
    def capacity(self) -> int:
        """Requests in a full batch."""
        return len(self.steps)


@dataclass(frozen=True)
class Machine:
    """What the replicas share.

    Attributes:
        cores: for the replicas.
        api_request, api_token: seconds that the API process takes for a request, and more for each
            of its tokens.
    """

    cores: int
    api_request: float = 0.0
    api_token: float = 0.0


@dataclass(frozen=True)
class Workload:
    """The requests.

    Attributes:
        clients: each sends its next request once it has its answer; 0 if requests
            arrive at random times instead.
        per_second: how many of these arrive per second on average.
        requests: how many there are.
        prompt_tokens: of each prompt, without those that are cached.
        completion_tokens: of each answer.
    """

    clients: int = 0
    per_second: float = 0.0
    requests: int = 200
    prompt_tokens: int = 0
    completion_tokens: int = 60


@dataclass(frozen=True)
class Served:
    """The result of a workload.

    Attributes:
        per_second: answers per second.
        latencies: seconds from each request to its answer, in the order of the answers.
    """

    per_second: float
    latencies: list[float]

    def percentile(self, percent: int) -> float:
        """The percentile of the latencies, in seconds."""
        return statistics.quantiles(self.latencies, n=100)[percent - 1]


def limit(workload: Workload, replica: Replica, machine: Machine, replicas: int) -> float:
    """The upper bound of requests per second: that of replicas with batches of the best size, or
    that of the API process."""
    largest = replica.capacity
    if workload.clients:
        largest = min(largest, math.ceil(workload.clients / replicas))
    best = max(_of_batch(workload, replica, size) for size in range(1, largest + 1))
    at_once = min(replicas, machine.cores / replica.threads) if replica.threads else replicas
    api = machine.api_request + workload.completion_tokens * machine.api_token
    return min(at_once * best, 1 / api if api else math.inf)


def _of_batch(workload: Workload, replica: Replica, size: int) -> float:
    """Requests per second of one replica with a batch that always has this size."""
    prefill = size * workload.prompt_tokens / replica.prefill
    return size / (prefill + workload.completion_tokens * replica.steps[size - 1])


def simulate(
    workload: Workload, replica: Replica, machine: Machine, replicas: int, seed: int = 0
) -> Served:
    """Serves a workload; the same seed gives the same result."""
    return _Simulation(workload, replica, machine, replicas).run(Random(seed))


@dataclass(eq=False)
class _Request:
    sent: float
    remaining: int


@dataclass(eq=False)
class _Batch:
    """One replica: its requests, those that join at the next step, and whether it is in a step."""

    active: list[_Request] = field(default_factory=list)
    joining: list[_Request] = field(default_factory=list)
    stepping: bool = False

    def __len__(self) -> int:
        return len(self.active) + len(self.joining)


class _Simulation:
    def __init__(
        self, workload: Workload, replica: Replica, machine: Machine, replicas: int
    ) -> None:
        self._workload, self._replica, self._machine = workload, replica, machine
        self._batches = [_Batch() for _ in range(replicas)]
        self._queue: deque[_Request] = deque()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._api_free = 0.0
        self._unsent = workload.requests
        self._latencies: list[float] = []

    def run(self, random: Random) -> Served:
        now = 0.0
        for _ in range(self._workload.clients):
            self._send(0.0)
        while not self._workload.clients and self._unsent:
            now += random.expovariate(self._workload.per_second)
            self._send(now)
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        return Served(len(self._latencies) / now, self._latencies)

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happen))

    def _send(self, now: float) -> None:
        if self._unsent:
            self._unsent -= 1
            request = _Request(now, self._workload.completion_tokens)
            self._at(now, lambda now: self._arrive(now, request))

    def _arrive(self, now: float, request: _Request) -> None:
        self._at(self._api(now, self._machine.api_request), lambda now: self._admit(now, request))

    def _admit(self, now: float, request: _Request) -> None:
        self._queue.append(request)
        self._dispatch(now)

    def _api(self, now: float, seconds: float) -> float:
        """When the API process, which does one thing after the other, has done this too."""
        self._api_free = max(now, self._api_free) + seconds
        return self._api_free

    def _dispatch(self, now: float) -> None:
        while self._queue:
            batch = min(self._batches, key=len)
            if len(batch) == self._replica.capacity:
                return
            batch.joining.append(self._queue.popleft())
            if not batch.stepping:
                self._begin_step(now, batch)

    def _begin_step(self, now: float, batch: _Batch) -> None:
        prefill = len(batch.joining) * self._workload.prompt_tokens / self._replica.prefill
        batch.active += batch.joining
        batch.joining.clear()
        batch.stepping = bool(batch.active)
        if batch.stepping:
            seconds = prefill + self._replica.steps[len(batch.active) - 1]
            self._at(now + seconds * self._slowdown(), lambda now: self._end_step(now, batch))

    def _slowdown(self) -> float:
        """Busy replicas share the cores."""
        busy = sum(batch.stepping for batch in self._batches)
        return max(1.0, busy * self._replica.threads / self._machine.cores)

    def _end_step(self, now: float, batch: _Batch) -> None:
        done = self._api(now, len(batch.active) * self._machine.api_token)
        for request in batch.active:
            request.remaining -= 1
            if not request.remaining:
                self._at(done, functools.partial(self._answer, request=request))
        batch.active = [request for request in batch.active if request.remaining]
        batch.stepping = False
        self._dispatch(now)
        if not batch.stepping:
            self._begin_step(now, batch)

    def _answer(self, now: float, request: _Request) -> None:
        self._latencies.append(now - request.sent)
        if self._workload.clients:
            self._send(now)

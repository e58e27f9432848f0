"""The cost of OpenAI's protocol: `python -m benchmarks.openai_cost`.

It compares the CPU time of the API process for a request to `/v1/chat/completions` and for one to
`/generate/` with the same messages and the same tokens, plain and as a stream. The target is a
ratio of at most 1.10. The model's worker is another process and does not count.

The paths take turns, in another order each round; the result is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from llm_sidecar import hermes_plugin
from tests.live_server import LiveServer, serve

PROMPT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run."
TOKENS: Final = 160
WANTED: Final = 1.10
_DEMO: Final = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "HERMES_TEMPERATURE": "0"}
_CHATS: Final[dict[str, list[dict[str, str]]]] = {
    "hermes": list(hermes_plugin.chat_messages(PROMPT)),
    # The server adds the system prompt.
    "phi3": [{"role": "user", "content": PROMPT}],
}


class Call(NamedTuple):
    """A request, the same each time."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=20, help="number of rounds, in which both paths take turns"
    )
    parser.add_argument(
        "--requests", type=int, default=100, help="number of requests to each path in each round"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), **_DEMO) as server:
        server.wait_until_ready()
        for model in _CHATS:
            for streamed in (False, True):
                compare(server, model, streamed, options.rounds, options.requests)


def compare(server: LiveServer, model: str, streamed: bool, rounds: int, requests: int) -> None:
    """Prints the CPU time of a request to each path, and the median ratio."""
    calls = {"/generate": ours(model, streamed), "/v1": openais(model, streamed)}
    tokens = same_tokens(server.client, model)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    # The first round warms up.
    for number in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            seconds = processor_seconds(server, calls[name], requests)
            if number > 0:
                spent[name].append(1000 * seconds / requests)
    ratios = [v1 / own for own, v1 in zip(spent["/generate"], spent["/v1"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    own, v1 = (statistics.median(each) for each in spent.values())
    print(
        f"{model}, {'a stream' if streamed else 'plain'}, {tokens} tokens: {own:.2f} ms on "
        f"/generate and {v1:.2f} ms on /v1/chat/completions; {middle:.3f} of it (quartiles "
        f"{low:.3f} and {high:.3f}), wanted at most {WANTED:.2f}",
        flush=True,
    )


def ours(model: str, streamed: bool) -> Call:
    accept = {"Accept": "text/event-stream"} if streamed else {}
    return Call(f"/generate/{model}/", {"prompt": PROMPT, "max_length": TOKENS}, accept)


def openais(model: str, streamed: bool) -> Call:
    body = {
        "model": model,
        "messages": _CHATS[model],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": streamed,
    }
    return Call("/v1/chat/completions", body, {})


def same_tokens(client: httpx.Client, model: str) -> str:
    """The number of prompt and completion tokens of both paths.

    Raises:
        RuntimeError: they differ.
    """
    own = answer(client, ours(model, streamed=False)).headers
    usage = answer(client, openais(model, streamed=False)).json()["usage"]
    counts = (int(own["X-Prompt-Tokens"]), int(own["X-Completion-Tokens"]))
    if counts != (usage["prompt_tokens"], usage["completion_tokens"]):
        raise RuntimeError(f"{model}: {counts} tokens on /generate, {usage} on /v1")
    return "{} + {}".format(*counts)


def processor_seconds(server: LiveServer, call: Call, requests: int) -> float:
    """The CPU time of the API process for this many requests, one after the other."""
    before = nanoseconds(server.process.pid)
    for _ in range(requests):
        answer(server.client, call)
    return (nanoseconds(server.process.pid) - before) / 1e9


def nanoseconds(pid: int) -> int:
    """Processor time of all threads of a process, finer than the clock ticks of its statistics."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


def answer(client: httpx.Client, call: Call) -> httpx.Response:
    response = client.post(call.path, json=call.body, headers=call.headers)
    return response.raise_for_status()


if __name__ == "__main__":
    main()

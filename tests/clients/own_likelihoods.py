"""Log likelihoods as an engine computes them itself, without HTTP.

    python -m tests.clients.own_likelihoods MODEL < continuations.json > likelihoods.json

The input is a list of pairs: the tokens of a prompt and its continuation, and the number of prompt
tokens. The output has a pair for each: the log likelihood of the continuation, and whether greedy
decoding generates it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_sidecar.engines import Engine, GenerationRequest, load_engine


def likelihood(engine: Engine, tokens: Sequence[int], prompt_tokens: int) -> tuple[float, bool]:
    """The log likelihood of the tokens after the prompt, and whether each is the most likely."""
    request = GenerationRequest([], 1, tokens=tokens, prompt_logprobs=1)
    read = [token for delta in engine.stream(request) for token in delta.prompt_logprobs]
    assert [token.id for token in read] == list(tokens)
    total, is_greedy = 0.0, True
    for token in read[prompt_tokens:]:
        assert token.logprob is not None
        total += token.logprob
        is_greedy = is_greedy and token.top[0].id == token.id
    return total, is_greedy


if __name__ == "__main__":
    engine = load_engine(Path(sys.argv[1]), device="cpu", threads=2, dtype="float32")
    json.dump([likelihood(engine, *each) for each in json.load(sys.stdin)], sys.stdout)

"""One completion on llama.cpp, which may take several requests."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from llm_sidecar.engines.base import (
    Delta,
    FinishReason,
    GenerationRequest,
    Sampling,
    TokenLogprob,
)
from llm_sidecar.engines.llama_guidance import check_answer, grammar_of, guidance_fields
from llm_sidecar.engines.llama_probabilities import ANSWER, Answer
from llm_sidecar.engines.sampling import sampling_of

if TYPE_CHECKING:
    from llm_sidecar.engines.llama_cpp import LlamaCppEngine

_SEGMENT: Final = 8
"""Number of tokens with log probabilities for each request to llama.cpp."""
_SEEDS: Final = (1 << 32) - 1
"""Number of seeds. The largest 32-bit number is excluded: it stands for a random seed."""


class LlamaCompletion:
    """A completion, which runs in a thread of its own.

    Attributes:
        size: maximum number of prompt and completion tokens.
        connection: cancels the request.
    """

    def __init__(
        self,
        engine: LlamaCppEngine,
        request: GenerationRequest,
        prompt: Sequence[int],
        ignore_end: bool = False,
    ) -> None:
        """Sends nothing yet.

        Args:
            ignore_end: whether the model cannot end its turn.
        """
        self._limit = request.most_tokens(len(prompt), engine.context_length)
        self.size = len(prompt) + self._limit
        self.connection = engine.server.connect()
        self._engine = engine
        self._request = request
        self._prompt = prompt
        self._ignore_end = ignore_end
        self._cached = 0
        self._generated = 0

    def deltas(self) -> Iterator[Delta]:
        """Its deltas, as they come.

        Raises:
            ModelUnavailable: llama.cpp refuses the request, or the answer breaks its schema.
            OSError, http.client.HTTPException: the connection fails, or is cancelled.
        """
        text = ""
        for delta in self._deltas():
            text += delta.text
            if delta.finish_reason == "stop":
                self._check(text)
            yield delta

    def _deltas(self) -> Iterator[Delta]:
        if self._request.prompt_logprobs is not None:
            yield from self._prompt_logprobs(self._request.prompt_logprobs)
        if self._request.logprobs is None or self._limit == 0:
            yield from self._stream()
        else:
            yield from self._segments(self._request.logprobs)

    def _check(self, text: str) -> None:
        schema = self._request.guidance
        if schema is not None and grammar_of(schema) is None:
            check_answer(schema, text)

    def _stream(self) -> Iterator[Delta]:
        body = self._body() | {"stream": True, "return_progress": True}
        for event in self.connection.events("/completion", body):
            yield self._delta_of(event)
            if event.get("stop"):
                return
        raise ConnectionError("the stream ended early")

    def _delta_of(self, event: Mapping[str, Any]) -> Delta:
        if "prompt_progress" in event:
            self._found_cached(event["prompt_progress"]["cache"])
        reason: FinishReason | None = None
        if event.get("stop"):
            reason = "length" if event["stop_type"] == "limit" else "stop"
        if self._limit == 0:
            # llama.cpp generates one token even if none is requested.
            return self._delta("", reason)
        self._generated = event.get("tokens_predicted", self._generated)
        return self._delta(event.get("content", ""), reason)

    def _delta(
        self,
        text: str = "",
        reason: FinishReason | None = None,
        logprobs: Sequence[TokenLogprob] = (),
        prompt_logprobs: Sequence[TokenLogprob] = (),
    ) -> Delta:
        return Delta(
            text,
            len(self._prompt),
            self._generated,
            self._cached,
            reason,
            tuple(logprobs),
            tuple(prompt_logprobs),
        )

    def _prompt_logprobs(self, top: int) -> Iterator[Delta]:
        """Forces each token of the prompt after its predecessors; no faster method is exact."""
        first, *rest = self._prompt
        # Use only its bytes: the first token has no log probability.
        data = self._logprob([first], first, 0).data
        yield self._delta(prompt_logprobs=(TokenLogprob(first, data, None),))
        for number, token in enumerate(rest, 1):
            found = self._logprob(self._prompt[:number], token, top)
            yield self._delta(prompt_logprobs=(found,))

    def _segments(self, top: int) -> Iterator[Delta]:
        """Generates some tokens at a time: a stream leaves out tokens that end inside a character.

        A grammar does not continue in the next request, so a guided completion is one segment.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tokens: list[int] = []
        reason: FinishReason | None = None
        while reason is None:
            count = self._limit - len(tokens)
            if self._request.guidance is None:
                count = min(count, _SEGMENT)
            answer = self._segment(tokens, count, top)
            logprobs = self._logprobs(tokens, answer, top)
            tokens += answer.tokens
            self._generated = len(tokens)
            if answer.stop_type == "eos":
                reason = "stop"
                # The token that ends the turn has no text.
                logprobs = logprobs[:-1]
            elif len(answer.tokens) < count or len(tokens) == self._limit:
                reason = "length"
            # Leave out an incomplete character.
            text = decoder.decode(self._engine.probabilities.text(logprobs))
            yield self._delta(text, reason, logprobs)

    def _segment(self, tokens: Sequence[int], count: int, top: int) -> Answer:
        body = self._body() | {
            "prompt": [*self._prompt, *tokens],
            "n_predict": count,
            "n_probs": max(top, 1),
            "post_sampling_probs": False,
            "return_tokens": True,
        }
        if self._request.seed is not None:
            # Each segment needs another seed, or all would draw the same random numbers.
            body["seed"] = (self._request.seed + len(tokens)) % _SEEDS
        answer = ANSWER.decode(self.connection.post("/completion", body))
        if not tokens:
            self._found_cached(answer.timings.cache_n)
        return answer

    def _found_cached(self, tokens: int) -> None:
        # After prompt log probabilities, the cached states come from this request itself.
        self._cached = tokens if self._request.prompt_logprobs is None else 0

    def _logprobs(self, before: Sequence[int], answer: Answer, top: int) -> list[TokenLogprob]:
        """The log probabilities of an answer; requests all of them again if some are missing."""
        positions = answer.completion_probabilities
        if len(positions) == len(answer.tokens):
            return [self._engine.probabilities.read(position, top) for position in positions]
        so_far = [*self._prompt, *before, *answer.tokens]
        start = len(self._prompt) + len(before)
        return [
            self._logprob(so_far[:number], token, top)
            for number, token in enumerate(answer.tokens, start)
        ]

    def _logprob(self, before: Sequence[int], token: int, top: int) -> TokenLogprob:
        return self._engine.probabilities.of(self.connection, before, token, top)

    def _body(self) -> dict[str, Any]:
        request = self._request
        sampling = sampling_of(request, self._engine.sampling)
        body = {
            "prompt": self._prompt,
            "n_predict": self._limit,
            "cache_prompt": True,
            "ignore_eos": self._ignore_end,
            **sampling_fields(sampling),
            # Penalties count the whole prompt and completion, as in the other engines.
            "repeat_last_n": self._engine.context_length,
        }
        if request.seed is not None:
            body["seed"] = request.seed % _SEEDS
        if request.guidance is not None:
            body |= guidance_fields(request.guidance)
        return body


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The sampling fields of a completion request."""
    return {
        # Apply the filters in the same order as the other engines.
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
    }

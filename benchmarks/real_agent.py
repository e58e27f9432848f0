"""One side of `make bench-real` in a process of its own: an engine that answers commands.

    python -m benchmarks.real_agent ours '{"folder": "…", "threads": 2}'
    python -m benchmarks.real_agent xllamacpp '{"file": "…", "threads": 2}'

It reads one JSON object a line from standard input and answers with one on standard output;
`real_agent.mjs` does the same with node-llama-cpp.

    {"do": "load"}
    {"do": "generate", "prompts": ["…"], "max_tokens": 64, "guidance": "…", "grammar": "…"}
        -> {"began": 1.0, "tokens": [[1.5, 1.6]], "prompt_tokens": [512], "texts": ["…"]}
    {"do": "score", "messages": […], "prompt": "…", "choices": ["0", "1"]}
        -> {"seconds": 0.1}

`tokens` has the time of each token of each prompt. Prompts are text with control tokens.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

SLOTS: Final = 8
CONTEXT: Final = 1024
"""Tokens of each slot."""

Command = dict[str, Any]


class Ours:
    """One of our engines, loaded from a folder or a .gguf file."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Imports the runtime, so that its memory does not count as the model's."""
        folder = Path(options.pop("folder"))
        if folder.suffix == ".gguf":
            import llm_sidecar.engines.llama_cpp
        elif (folder / "genai_config.json").is_file():
            import llm_sidecar.engines.ort
        else:
            import llm_sidecar.engines.torch  # noqa: F401
        self._folder, self._options = folder, options
        self._engine: Any = None

    def load(self) -> Command:
        from llm_sidecar.engines import load_engine

        self._engine = load_engine(self._folder, device="cpu", **self._options)
        return {}

    def generate(self, command: Command) -> Command:
        from llm_sidecar.engines import GenerationRequest
        from llm_sidecar.engines.base import unless_failed

        prompts = [self._tokens(prompt) for prompt in command["prompts"]]
        most, guidance = command["max_tokens"], command.get("guidance")
        times: list[list[float]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        batch, began = self._engine.batch(), time.perf_counter()
        waiting = list(enumerate(prompts))
        while batch or waiting:
            while waiting and len(batch) < batch.capacity:
                number, tokens = waiting.pop(0)
                batch.add(number, GenerationRequest([], most, guidance, tokens=tokens))
            for number, result in batch.step():
                delta = unless_failed(result)
                new = delta.completion_tokens - len(times[number])
                times[number] += [time.perf_counter()] * new
                texts[number] += delta.text
        return {
            "began": began,
            "tokens": times,
            "prompt_tokens": [len(tokens) for tokens in prompts],
            "texts": texts,
        }

    def score(self, command: Command) -> Command:
        began = time.perf_counter()
        self._engine.score_choices(command["messages"], command["choices"])
        return {"seconds": time.perf_counter() - began}

    def _tokens(self, text: str) -> list[int]:
        encode: Callable[..., Any] = self._engine._chat.tokenizer.encode_batch_fast
        tokens: list[int] = encode([text], add_special_tokens=False)[0].ids
        return tokens

    def close(self) -> None:
        """Ends llama.cpp's server."""
        if self._folder.suffix == ".gguf":
            self._engine.server.close()


class Xllamacpp:
    """llama.cpp in its wheel `xllamacpp`."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Imports it."""
        import xllamacpp

        self._package, self._options = xllamacpp, options
        self._server: Any = None

    def load(self) -> Command:
        params = self._package.CommonParams()
        params.model.path = self._options["file"]
        params.n_ctx, params.n_parallel = SLOTS * CONTEXT, SLOTS
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._options["threads"]
        params.cache_ram_mib = 0
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.verbosity = -1
        self._server = self._package.Server(params)
        return {}

    def generate(self, command: Command) -> Command:
        prompts = command["prompts"]
        results: list[Any] = [None] * len(prompts)
        began = time.perf_counter()

        def ask(number: int) -> None:
            results[number] = self._complete(
                prompts[number], command["max_tokens"], command.get("guidance")
            )

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "began": began,
            "tokens": [result[0] for result in results],
            "prompt_tokens": [result[1] for result in results],
            "texts": [result[2] for result in results],
        }

    def score(self, command: Command) -> Command:
        began = time.perf_counter()
        self._complete(command["prompt"], 1, None, logprobs=len(command["choices"]))
        return {"seconds": time.perf_counter() - began}

    def close(self) -> None:
        """The process ends the server."""

    def _complete(
        self, prompt: str, most: int, guidance: str | None, **more: Any
    ) -> tuple[list[float], int, str]:
        """The time of each token, the number of prompt tokens, and the text."""
        times: list[float] = []
        texts: list[str] = []
        prompt_tokens = 0

        def receive(chunk: dict[str, Any]) -> None:
            nonlocal prompt_tokens
            if "usage" in chunk:
                prompt_tokens = chunk["usage"]["prompt_tokens"]
            if text := chunk["choices"][0]["text"]:
                texts.append(text)
                times.append(time.perf_counter())

        request: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": most,
            "temperature": 0.0,
            "cache_prompt": True,
            "stream": True,
            **more,
        }
        if guidance is not None:
            # This build has llguidance, so it takes the schema as it is.
            request["json_schema"] = json.loads(guidance)
        self._server.handle_completions(request, receive)
        return times, prompt_tokens, "".join(texts)


AGENTS: Final[dict[str, Callable[[dict[str, Any]], Ours | Xllamacpp]]] = {
    "ours": Ours,
    "xllamacpp": Xllamacpp,
}


def answer(agent: Ours | Xllamacpp, command: Command) -> Command:
    """The answer to one command; an error is an answer too."""
    try:
        match command["do"]:
            case "load":
                return agent.load()
            case "generate":
                return agent.generate(command)
            case "score":
                return agent.score(command)
    except Exception as error:  # noqa: BLE001 - the parent reports it
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "unknown command"}


def main(arguments: Sequence[str]) -> None:
    # Runtimes write to standard output, so the answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, options = arguments
    agent = AGENTS[kind](json.loads(options))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(agent, json.loads(line))), file=answers, flush=True)
    agent.close()


if __name__ == "__main__":
    main(sys.argv[1:])

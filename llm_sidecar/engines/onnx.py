"""onnxruntime-genai: folders with a `genai_config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

# Read when the library loads. Without it both runtimes write a device id and events under
# ~/.cache and send them; `disable_telemetry_events` comes too late for that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime_genai as og

from llm_sidecar.engines.base import (
    PREFILL_CHUNK,
    AnswerTree,
    Delta,
    GenerationRequest,
    Message,
    SpecialTokens,
    check_context,
)
from llm_sidecar.errors import AdapterRejected, ModelUnavailable

_FAST_FORWARD_HEADROOM: Final = 128
"""Forced tokens may run past max_length and crash the attention kernel, so leave them room."""

_ADAPTER: Final = "active"
_ADAPTER_FILE: Final = "adapter.onnx_adapter"


class OnnxEngine:
    """A model built by `onnxruntime_genai.models.builder`."""

    runtime = "onnxruntime-genai"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        adapter: Path | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: holds genai_config.json, the model and its tokenizer.
            device: `auto` takes CUDA where the runtime has it.
            threads: of the decoder session, on CPU.
            adapter: folder with an `adapter.onnx_adapter` (onnxruntime's AdapterFormat) for a
                model that was built with LoRA inputs.

        Raises:
            ModelUnavailable: `cuda` is asked for and the runtime has none.
            AdapterRejected: the adapter's file is not there.
        """
        if device == "cuda" and not og.is_cuda_available():
            raise ModelUnavailable(
                "DEVICE=cuda, but the installed onnxruntime-genai has no CUDA; "
                "install onnxruntime-genai-cuda or set DEVICE=cpu"
            )
        self.device = "cuda" if device != "cpu" and og.is_cuda_available() else "cpu"
        config = og.Config(str(folder))
        if self.device == "cuda":
            config.clear_providers()
            config.append_provider("cuda")
        else:
            session = {
                "intra_op_num_threads": threads,
                "session.intra_op.allow_spinning": "0",
            }
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        written = json.loads((folder / "genai_config.json").read_bytes())
        self.context_length = int(written["model"]["context_length"])
        self._eos = frozenset(int(token) for token in self.tokenizer.eos_token_ids)
        self._special = SpecialTokens(folder)
        self._answer_trees: dict[tuple[str, ...], AnswerTree] = {}
        self._adapters = None if adapter is None else self._load_adapter(adapter)

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        prompt = self._encode(request.messages)
        count, limit = len(prompt), request.max_tokens
        headroom = 0 if request.guidance is None else _FAST_FORWARD_HEADROOM
        check_context(count, limit, self.context_length - headroom)
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=count + limit + headroom, **_sampling(request))
        if request.guidance is not None:
            params.set_guidance("json_schema", request.guidance, True)
        generator = self._generator(params)
        for start in range(0, count, PREFILL_CHUNK):
            if start:
                yield Delta("", count, 0)
            generator.append_tokens(prompt[start : start + PREFILL_CHUNK])
        decode = self.tokenizer.create_stream().decode
        done, ended = 0, False
        while not generator.is_done() and done < limit:
            generator.generate_next_token()
            step = generator.get_sequence(0)[count + done : count + limit]
            done += len(step)
            # A step under guidance may end without a token.
            ended = any(int(token) in self._eos for token in step)
            text = "".join(decode(token) for token in step if int(token) not in self._eos)
            yield Delta(text, count, done)
        # Without headroom it is done at the limit too.
        ended = ended or (headroom > 0 and generator.is_done())
        yield Delta("", count, done, "stop" if ended else "length")

    def answer_probabilities(
        self, messages: Sequence[Message], answers: Sequence[str]
    ) -> dict[str, float]:
        prompt = self._encode(messages)
        check_context(len(prompt), 2, self.context_length)
        tree = self._answer_tree(tuple(answers))
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt) + 2, do_sample=False)
        generator = self._generator(params)
        generator.append_tokens(prompt)
        first = generator.get_logits().reshape(-1)
        second = None
        if tree.branch is not None:
            generator.append_tokens([tree.branch])
            second = generator.get_logits().reshape(-1)
        return tree.read(first, second)

    def _generator(self, params: Any) -> Any:
        generator = og.Generator(self.model, params)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, _ADAPTER)
        return generator

    def _load_adapter(self, folder: Path) -> Any:
        file = folder / _ADAPTER_FILE
        if not file.is_file():
            raise AdapterRejected(f"the adapter {folder.name} holds no {_ADAPTER_FILE}")
        adapters = og.Adapters(self.model)
        adapters.load(str(file), _ADAPTER)
        return adapters

    def _encode(self, messages: Sequence[Message]) -> Any:
        text = self.tokenizer.apply_chat_template(
            json.dumps(self._special.neutralise(messages)), add_generation_prompt=True
        )
        return self.tokenizer.encode(text)

    def _answer_tree(self, answers: tuple[str, ...]) -> AnswerTree:
        if answers not in self._answer_trees:
            turn = json.dumps([{"role": "user", "content": "?"}])
            apply = self.tokenizer.apply_chat_template
            with_header = apply(turn, add_generation_prompt=True)
            header = with_header[len(apply(turn, add_generation_prompt=False)) :]
            skip = len(self.tokenizer.encode(header))
            encoded = {
                answer: [int(t) for t in self.tokenizer.encode(header + answer)[skip:]]
                for answer in answers
            }
            self._answer_trees[answers] = AnswerTree(encoded)
        return self._answer_trees[answers]


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    if request.temperature == 0.0:
        return {"do_sample": False}
    options = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
    if request.seed is not None:
        options["random_seed"] = request.seed
    return options

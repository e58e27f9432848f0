"""The layouts of well-known models: tokens and scores as transformers has them."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import GenerationRequest, Message, load_engine
from llm_sidecar.engines.chat import ChatTokenizer
from llm_sidecar.engines.onnx import OnnxEngine
from llm_sidecar.engines.requests import ANSWER_TOKENS
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from tests.model_layouts import LAYOUTS, write_layout
from tests.random_models import convert_to_onnx

PROPOSAL = {"ticker": "ABC", "action": "adjust", "confidence": 0.72, "rationale": "RSI at 81."}
CONTEXT = "Long ABC from 100, now 112.5, RSI 81."
EXAMPLES = [proposals.Example(f"{CONTEXT} Day {day}.", PROPOSAL) for day in range(3)]
CHATS = {
    "critique": hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, PROPOSAL, CONTEXT),
    "score": hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, PROPOSAL, CONTEXT),
    "free text": hermes_plugin.chat_messages("  Hold or\n sell?  \n"),
    "proposal": proposals.build_messages(CONTEXT),
    "one example": proposals.build_messages(CONTEXT, EXAMPLES[:1]),
    "three examples": proposals.build_messages(CONTEXT, EXAMPLES),
}
WITHOUT_THOUGHTS = {"enable_thinking": False, "thinking": False}
IN_USER_TURN = {"mistral-0.2", "phi3-april", "gemma-2"}
"""Layouts without a system role."""
ADDED = {
    "qwen-3-thinking": "\n</think>\n\n",
    "r1-distill": "\n</think>\n\n",
    "no-header": "<|im_start|>assistant\n",
}
"""What follows the template's own prompt so that an answer can begin."""
THOUGHT = "the chat template begins a thought: it is closed before the answer"
NO_SYSTEM = "the chat template has no system role: the system text begins the first user turn"
NOTES = {
    **dict.fromkeys(IN_USER_TURN, NO_SYSTEM),
    "qwen-3-thinking": THOUGHT,
    "r1-distill": THOUGHT,
    "no-header": "the chat template does not begin the assistant's turn: its header is added",
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = str(request.param)
    return write_layout(name, tmp_path_factory.mktemp("layouts") / name)


def for_the_model(name: str, messages: Sequence[Message]) -> Sequence[Message]:
    """The chat, with the system text in the first user turn if there is no system role."""
    if name not in IN_USER_TURN:
        return messages
    system, user, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others]


def transformers_tokens(tokenizer: Any, name: str, messages: Sequence[Message]) -> list[int]:
    """The tokens that transformers makes of the chat that the model is meant to get."""
    messages = for_the_model(name, messages)
    options = {"add_generation_prompt": True, **WITHOUT_THOUGHTS}
    if name not in ADDED:
        tokens: list[int] = tokenizer.apply_chat_template(messages, return_dict=False, **options)
        return tokens
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options) + ADDED[name]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_tokens_are_those_of_transformers(layout: Path) -> None:
    name = layout.name
    reference = AutoTokenizer.from_pretrained(layout, local_files_only=True)
    if layout.name == "llama-2":
        # transformers does not read this tokenizer.json as it is. onnxruntime gets the one that the
        # builder has transformers write.
        layout = layout / "converted"
        reference.save_pretrained(layout)
    chat = ChatTokenizer.from_folder(layout, frozenset())
    for kind, messages in CHATS.items():
        expected = transformers_tokens(reference, name, messages)
        assert chat.encode(messages) == expected, kind


def test_deviations_from_the_template_are_noted(layout: Path) -> None:
    notes = ChatTokenizer.from_folder(layout, frozenset()).notes
    assert notes == ((NOTES[layout.name],) if layout.name in NOTES else ())


def test_a_turn_ends_with_the_token_that_the_template_writes(layout: Path) -> None:
    chat = ChatTokenizer.from_folder(layout, frozenset())
    own = {"phi3-april": "<|end|>", "phi3-june": "<|end|>", "gemma-2": "<end_of_turn>"}
    expected = own.get(layout.name, LAYOUTS[layout.name].eos)
    assert chat.ends == {chat.tokenizer.token_to_id(expected)}


def test_a_prefix_is_what_all_later_prompts_share(layout: Path) -> None:
    chat = ChatTokenizer.from_folder(layout, frozenset())
    for kind in ("score", "proposal", "three examples"):
        *shared, last = CHATS[kind]
        prefix = chat.encode_prefix(shared)
        for text in ("Sell?", "7", last["content"]):
            prompt = chat.encode([*shared, {"role": "user", "content": text}])
            # The last one may be a space, which other texts join to their first word.
            assert prompt[: len(prefix) - 1] == prefix[:-1]
    if layout.name not in ("mistral-0.3", "llama-2"):
        # The other two have the system text, or what follows it, in the last turn.
        whole = chat.tokenizer.decode(prefix, skip_special_tokens=False)
        assert EXAMPLES[-1].prompt in whole


# Scores


def test_an_answer_has_the_tokens_that_it_has_in_the_whole_chat(layout: Path) -> None:
    name, folder = layout.name, layout
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if name == "llama-2":
        folder = layout / "converted"
        reference.save_pretrained(folder)
    chat = ChatTokenizer.from_folder(folder, frozenset())
    for kind in ("score", "three examples"):
        prompt = chat.encode(CHATS[kind])
        tree = chat.choice_tree(CHATS[kind], prompt, hermes_plugin.SCORE_ANSWERS)
        for answer, tail in tree.tails.items():
            expected = answered(reference, name, CHATS[kind], answer)
            assert [*prompt[: len(prompt) - tree.replaced], *tail] == expected
        assert len(tree.paths) == 1
        assert len(tree.paths[0]) <= ANSWER_TOKENS


SCORED = ("hermes-3", "phi3-june", "llama-2", "r1-distill", "vicuna")


@pytest.fixture(scope="module", params=SCORED)
def weighted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = str(request.param)
    return write_layout(name, tmp_path_factory.mktemp("scored") / name, weights=True)


def answered(tokenizer: Any, name: str, messages: Sequence[Message], answer: str) -> list[int]:
    """The tokens of a chat that ends with this answer, up to the answer's end."""
    messages = for_the_model(name, messages)
    if name in ADDED or name == "mistral-0.3":
        # Mistral's template leaves the system text out of a chat that ends with an answer.
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = prompt + ADDED.get(name, " ") + answer
    else:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": answer}],
            tokenize=False,
            continue_final_message=True,
            **WITHOUT_THOUGHTS,
        )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def slow_scores(folder: Path, messages: Sequence[Message], start: str = "") -> dict[str, float]:
    """The probability of each answer as the whole turn, or as the rest of the turn after `start`,
    from a forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    if start:
        prompt = answered(tokenizer, folder.name, messages, start)
    else:
        prompt = transformers_tokens(tokenizer, folder.name, messages)
    whole = {
        answer: answered(tokenizer, folder.name, messages, start + answer)
        for answer in hermes_plugin.SCORE_ANSWERS
    }
    columns = zip(prompt, *whole.values(), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    found = {}
    for answer, tokens in whole.items():
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0].double()
        steps = torch.log_softmax(logits, -1)[range(shared - 1, len(tokens) - 1), tokens[shared:]]
        found[answer] = math.exp(float(steps.sum()))
    longer = whole["10"][: len(whole["1"])] == whole["1"]
    return found | {"1": found["1"] - found["10"] * longer}


def test_scores_are_the_probabilities_of_the_whole_turn(weighted: Path) -> None:
    engine = load_engine(weighted, device="cpu")
    found = engine.score_choices(CHATS["score"], hermes_plugin.SCORE_ANSWERS)
    assert found == pytest.approx(slow_scores(weighted, CHATS["score"]), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("start", [hermes_plugin.SCORE_START, "Score:"])
def test_a_score_continues_the_start_of_the_answer(weighted: Path, start: str) -> None:
    engine = load_engine(weighted, device="cpu")
    messages = [*CHATS["score"], {"role": "assistant", "content": start}]
    found = engine.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    expected = slow_scores(weighted, CHATS["score"], start)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


# Folders as they are downloaded, on onnxruntime

MICROSOFT = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"
CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
REMOTE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "configuration_phi3.Phi3ForCausalLM",
}


def add_code(folder: Path) -> None:
    """Code beside the model as Microsoft offers it, which notes that it ran."""
    (folder / "configuration_phi3.py").write_text(CODE)
    for name, mapping in (
        ("config.json", REMOTE),
        ("tokenizer_config.json", {"AutoTokenizer": ["configuration_phi3.Phi3Tokenizer", None]}),
    ):
        written = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**written, "auto_map": mapping}))


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_layout(
        "phi3-april", tmp_path_factory.mktemp("phi3") / "phi3-april", weights=True
    )
    add_code(folder)
    return folder


@pytest.fixture(scope="module")
def microsoft(phi3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Microsoft's folder: the model file has a name of its own, and there is code beside it."""
    folder = tmp_path_factory.mktemp("microsoft") / "cpu-int4-rtn-block-32-acc-level-4"
    options = (f"filename={MICROSOFT}", "windowed_kv_cache=false")
    convert_to_onnx(phi3, folder, "fp32", options)
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text((phi3 / name).read_text())
    add_code(folder)
    return folder


def test_microsofts_folder_gives_the_scores_of_transformers(phi3: Path, microsoft: Path) -> None:
    assert (microsoft / MICROSOFT).is_file()
    engine = load_engine(microsoft, device="cpu")
    assert (engine.runtime, engine.context_length) == ("onnxruntime", 4096)
    found = engine.score_choices(CHATS["score"], hermes_plugin.SCORE_ANSWERS)
    assert found == pytest.approx(slow_scores(phi3, CHATS["score"]), rel=1e-2, abs=1e-6)


def test_microsofts_folder_writes_valid_proposals(microsoft: Path) -> None:
    engine = load_engine(microsoft, device="cpu")
    for seed in range(3):
        request = GenerationRequest(
            CHATS["one example"], 600, proposals.GUIDANCE, temperature=1.0, seed=seed
        )
        proposals.parse("".join(delta.text for delta in engine.stream(request)))


def test_code_beside_a_model_never_runs(phi3: Path, microsoft: Path) -> None:
    for folder in (phi3, microsoft):
        load_engine(folder, device="cpu")
        assert not (folder / "ran").exists()


def test_a_model_file_that_is_missing_is_named(microsoft: Path, tmp_path: Path) -> None:
    shutil.copyfile(microsoft / "genai_config.json", tmp_path / "genai_config.json")
    with pytest.raises(ModelUnavailable, match=f"lacks {re.escape(MICROSOFT)}, which its genai"):
        load_engine(tmp_path, device="cpu")


# A sliding window

WINDOW = 4096


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Hermes 2 Pro on Mistral, for transformers and for onnxruntime."""
    parent = tmp_path_factory.mktemp("windowed")
    source = write_layout("hermes-2-pro", parent / "hermes-2-pro", weights=True)
    return source, convert_to_onnx(source, parent / "onnx", "fp32")


def test_the_context_ends_with_the_sliding_window(windowed: tuple[Path, Path]) -> None:
    source, converted = windowed
    engine, other = load_engine(converted, device="cpu"), load_engine(source, device="cpu")
    serial = OnnxEngine(converted, device="cpu")
    assert (engine.runtime, engine.context_length) == ("onnxruntime", WINDOW)
    assert engine.notes == (
        f"the context is cut from 32768 to {WINDOW} tokens, the sliding window",
    )
    # The second time most of the prompt comes from the cache.
    for times, tokens in ((1, 151), (188, 4078), (188, 4078)):
        messages = hermes_plugin.chat_messages(f"{CONTEXT} " * times)
        assert len(engine.tokenize(GenerationRequest(messages, 8))) == tokens
        expected = other.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
        for each in (engine, serial):
            found = each.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-6)
    with pytest.raises(InvalidRequest, match=f"context of {WINDOW}"):
        engine.tokenize(GenerationRequest(hermes_plugin.chat_messages(f"{CONTEXT} " * 190), 8))

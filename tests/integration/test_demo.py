"""The demo: its synthetic market, its recipe, and the models that are shipped."""

from __future__ import annotations

import collections
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import llguidance
import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.demo import __main__ as command_line
from llm_sidecar.demo import evaluate, judgement, lessons, market, recipe
from llm_sidecar.demo.batches import batches, drawn_lessons, padded
from llm_sidecar.demo.forward import attention, forward, hold, logits
from llm_sidecar.demo.lessons import IGNORED, Encoded, encode
from llm_sidecar.demo.muon import Muon, orthogonal
from llm_sidecar.demo.passes import rounded
from llm_sidecar.demo.schedule import Schedule
from llm_sidecar.demo.situations import SITUATIONS, answer
from llm_sidecar.demo.tickers import random_ticker, split_of
from llm_sidecar.demo.tokenizer import PHI3, train_tokenizer
from llm_sidecar.demo.training import _hardest, _losses, prepare_attention, train
from llm_sidecar.engines import Engine, GenerationRequest, Message, load_engine
from llm_sidecar.models.files import DEMO_DIR
from tests.live_server import ROOT


def cases(count: int, seed: int = 1) -> list[market.Case]:
    rng = Random(seed)
    return [market.draw(rng, "train") for _ in range(count)]


# The synthetic market


def test_every_answer_can_be_written_under_guidance() -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(proposals.GUIDANCE)
    for case in cases(300):
        proposals.Proposal.model_validate(case.proposal)
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        tokens = tokenizer.tokenize_str(proposals.dumps(case.proposal))
        assert matcher.try_consume_tokens(tokens) == len(tokens), case
        assert matcher.is_accepting(), case


def test_every_prompt_names_its_ticker_and_every_rationale_its_situation() -> None:
    for case in cases(500):
        assert case.proposal["ticker"] in case.prompt
        assert SITUATIONS[case.situation].keyword in case.proposal["rationale"].lower()


def test_training_never_sees_a_held_out_ticker() -> None:
    rng = Random(2)
    assert all(split_of(random_ticker(rng, "train")) == "train" for _ in range(300))
    assert all(split_of(random_ticker(rng, "held-out")) == "held-out" for _ in range(300))
    assert all(split_of(case.proposal["ticker"]) == "train" for case in cases(300))


def test_the_same_seed_gives_the_same_market() -> None:
    assert cases(50) == cases(50)
    assert cases(50) != cases(50, seed=2)


def test_prompts_hardly_repeat() -> None:
    assert len({case.prompt for case in cases(1000)}) > 995


def test_a_side_is_hurt_by_what_helps_the_other() -> None:
    long = answer("broke_support", "ABC", "LONG", "12.5", None)
    short = answer("broke_support", "ABC", "SHORT", "12.5", None)
    assert (long["action"], short["action"]) == ("abort", "adjust")
    assert "12.5" in long["rationale"]
    assert "side" not in answer("broke_support", "ABC", None, None, None)


def test_a_wild_market_widens_and_a_calm_one_tightens() -> None:
    stops = [answer("winner", "ABC", "LONG", None, atr)["new_stop_pct"] for atr in ("1", "2", "4")]
    assert stops == sorted(stops)
    assert len(set(stops)) == 3


# What Hermes learns


@pytest.mark.parametrize(
    ("stop", "target", "points"), [(2, 2, 5), (1, 4, 10), (4, 1, 0), (2, 4, 7.5)]
)
def test_the_score_grows_with_reward_to_risk(stop: float, target: float, points: float) -> None:
    proposal = {"new_stop_pct": stop, "new_target_pct": target}
    assert judgement.score(proposal, fits=True) == pytest.approx(points)
    assert judgement.score(proposal, fits=False) == pytest.approx(max(0, points - 3))


def test_hermes_lessons_use_the_servers_own_prompts() -> None:
    teach = judgement.teacher(1)
    chats = [teach(1.0).messages for _ in range(200)]
    whole = [chat for chat in chats if chat[0]["role"] == "system"]
    assert len(whole) > 100
    tasks = set()
    for chat in whole:
        assert chat[0]["content"] == hermes_plugin.SYSTEM_PROMPT
        tasks.add(chat[1]["content"].rpartition("\n\n")[2])
        if chat[1]["content"].endswith(hermes_plugin.SCORE_TASK):
            assert chat[-1]["content"] in hermes_plugin.SCORE_ANSWERS
    assert {hermes_plugin.SCORE_TASK, hermes_plugin.CRITIQUE_TASK} <= tasks


# Lessons


def test_lessons_begin_short_and_end_as_the_server_asks() -> None:
    teach = market.teacher(1)
    first = [teach(0.0) for _ in range(200)]
    assert all(len(lesson.messages) == 2 for lesson in first)
    assert all(len(lesson.messages[0]["content"]) <= 70 for lesson in first)
    last = [teach(1.0) for _ in range(200)]
    assert all(les.messages[0]["content"] == proposals.SYSTEM_PROMPT for les in last)
    assert any(len(lesson.messages) > 3 for lesson in last)


def test_only_what_the_assistant_says_is_learned() -> None:
    tokenizer = load_tokenizer()
    messages = [
        Message(role="user", content="Long ABC"),
        Message(role="assistant", content='{"ticker":"ABC","action":"pass"}'),
    ]
    whole = lessons.encode(tokenizer, lessons.Lesson(messages))
    assert tokenizer.decode(whole.ids) == (
        '<|user|>\nLong ABC<|end|>\n<|assistant|>\n{"ticker":"ABC","action":"pass"}<|end|>'
    )
    learned = [label for label in whole.labels if label >= 0]
    assert tokenizer.decode(learned) == '{"ticker":"ABC","action":"pass"}<|end|>'
    head = lessons.encode(tokenizer, lessons.Lesson(messages, last=13))
    assert head.ids == whole.ids[: len(head.ids)]
    assert tokenizer.decode([label for label in head.labels if label >= 0]).startswith(
        '{"ticker":"AB'
    )
    assert tokenizer.eos_token_id not in head.labels


def test_hints_lead_from_each_token_to_where_the_prompt_has_it() -> None:
    tokenizer = load_tokenizer()
    case = market.Case(
        "We shorted QX.L, RSI 81.5 hot, ATR 3.2%",
        answer("overbought", "QX.L", "SHORT", "81.5", "3.2"),
        "overbought",
        ("RSI 81.5 hot",),
        atr="3.2",
    )
    text = proposals.dumps(case.proposal)
    messages = [Message(role="user", content=case.prompt), Message(role="assistant", content=text)]
    lesson = lessons.Lesson(messages, hints=market.hints(case, text))
    encoded = lessons.encode(tokenizer, lesson)

    def tokens(places: Sequence[int]) -> str:
        return "".join(tokenizer.decode([encoded.ids[at]]) for at in places)

    found = [(look.way, tokens([look.at + 1]), tokens(look.sources)) for look in encoded.looks]
    copied = [(answered, asked) for way, answered, asked in found if way == "copied"]
    # The first token and the one behind are known where the word has been read.
    ticker = [("Q", "L,"), ("X", "X"), (".", "."), ("L", "L"), ('","', ",")]
    assert copied[: len(ticker)] == ticker
    assert [asked for _, asked in copied[len(ticker) :]] == ["5 hot", "1", ".", "5", " hot"]
    words = [
        (tokens([look.at]), tokens(look.sources)) for look in encoded.looks if look.way == "word"
    ]
    assert {("L", "Q"), (",", "Q"), (" hot", "8")} <= set(words)
    reasons = {way: {asked for w, _, asked in found if w == way} for way, _, _ in found}
    assert reasons["side"] == {" shorted "}
    assert reasons["situation"] == {"RSI 81.5 hot"}
    assert reasons["range"] == {"3.2"}
    assert {"side", "SHORT"} <= {tokens([at]) for at in encoded.decisions}


def test_only_the_position_tells_the_side() -> None:
    prompt = "Longs were trapped early. LNG -> long 20 ABC, buyers were active, +2.9% today"
    case = market.Case(
        prompt, answer("overbought", "ABC", "LONG", None, None), "overbought", (), ("long 20 ABC",)
    )
    text = proposals.dumps(case.proposal)
    sides = [hint for hint in market.hints(case, text) if hint.way == "side"]
    assert {prompt[slice(*source)] for hint in sides for source in hint.sources or ()} == {"long"}
    start = prompt.index("long 20")
    assert {source for hint in sides for source in hint.sources or ()} == {(start, start + 4)}


def test_the_tersest_sides_come_more_often_in_lessons_than_in_prompts() -> None:
    def terse(prompt: str) -> bool:
        return re.search(r"(?<![\w.])[-+]\d[\d,]*k?(?![\w.,%])", prompt) is not None

    teach = market.teacher(1)
    # Hard ones come again only once enough of them wait.
    taught = [terse(teach(0.0).messages[-2]["content"]) for _ in range(3000)][2000:]
    rng = Random(1)
    drawn = [terse(market.draw(rng, "train", 70).prompt) for _ in range(1000)]
    assert sum(taught) > 1.5 * sum(drawn) > 0


def test_nearly_every_hint_has_a_source() -> None:
    ways: dict[str, list[bool]] = {}
    for case in cases(500):
        for hint in market.hints(case, proposals.dumps(case.proposal)):
            stated = {"side": "side" in case.proposal, "range": case.atr is not None}
            if stated.get(hint.way, True):
                ways.setdefault(hint.way, []).append(bool(hint.sources))
    shares = {way: sum(found) / len(found) for way, found in ways.items()}
    assert shares["copied"] > 0.99
    assert all(share > 0.9 for share in shares.values()), shares


def test_weights_are_rounded_as_the_runtime_rounds_them() -> None:
    model = ir.load(DEMO_DIR / "phi3" / "model.onnx")
    names = [name[:-3] for name in model.graph.initializers if name.endswith("_Q4")]
    assert len(names) > 10
    for name in names:
        packed, steps = (
            np.asarray(model.graph.initializers[name + end].const_value)
            for end in ("_Q4", "_scales")
        )
        whole = np.stack([packed & 15, packed >> 4], -1).reshape(*steps.shape, 32) - 8.0
        held = torch.tensor(whole * steps[..., None], dtype=torch.float32).flatten(1)
        # A block that has lost its extreme to rounding is none that was rounded so.
        torch.testing.assert_close(rounded(held), held, atol=1e-6, rtol=0)
        apart = torch.rand(held.shape, generator=torch.Generator().manual_seed(1)) - 0.5
        near = held + 0.4 * apart * torch.tensor(steps).abs().repeat_interleave(32, 1)
        extreme = torch.tensor(whole).flatten(1) == -8
        assert extreme.any()
        torch.testing.assert_close(
            rounded(torch.where(extreme, held, near)), held, atol=1e-6, rtol=0
        )


def test_muons_steps_are_orthogonal() -> None:
    for shape in ((48, 96), (96, 48), (64, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonal(matrix).float())
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_muon_takes_the_steps_of_torchs_own() -> None:
    matrices = [
        torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(1)))
        for _ in range(2)
    ]
    optimizers = (
        Muon(matrices[:1], 0.02),
        torch.optim.Muon(matrices[1:], 0.02, weight_decay=0.01, momentum=0.95),
    )
    for step in range(3):
        for matrix, optimizer in zip(matrices, optimizers, strict=True):
            matrix.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(matrices[0], matrices[1], atol=2e-3, rtol=0)


def test_a_ticker_that_ends_like_an_acronym_is_spelt_out_as_the_runtime_reads_it(
    tmp_path: Path,
) -> None:
    drawn = [case.prompt for case in cases(300)]
    tokenizer = train_tokenizer(drawn, PHI3, 1000, whole=("CPI", "SELL", "L"))
    folder = tmp_path / "phi3"
    shutil.copytree(DEMO_DIR / "phi3", folder)
    (folder / "tokenizer.json").unlink()
    tokenizer.save_pretrained(folder)
    runtime = og.Tokenizer(og.Model(str(folder)))

    # In its chat a message is behind a line's end.
    text = "\nDCPI CPI, (CPI) 1CPI CPIX\nSELL|XSELL Sell AB.L"
    parts = [tokenizer.decode([token]).strip() for token in runtime.encode(text)]
    assert " ".join(filter(None, parts)).startswith("D C P I CPI , ( CPI ) 1 C P I C P I X SELL |")
    assert "".join(parts).endswith("XSELLSellAB.L")
    for one in (text, *(f"\n{prompt}" for prompt in drawn)):
        ids = tokenizer.encode(one, add_special_tokens=False)
        assert [int(token) for token in runtime.encode(one)] == ids
        assert tokenizer.decode(ids) == one


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")


# Measuring


def test_rank_correlation_is_spearmans() -> None:
    assert evaluate.rank_correlation([1, 2, 3], [10, 20, 21]) == pytest.approx(1.0)
    assert evaluate.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Worked by hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
    assert evaluate.rank_correlation([1, 5, 5, 9], [2, 6, 4, 8]) == pytest.approx(0.9486833)


def test_a_missed_promise_is_told_from_a_kept_one() -> None:
    assert evaluate.Figure("x", 0.99, 10, 0.99).kept
    assert not evaluate.Figure("x", 0.98, 10, 0.99).kept
    assert evaluate.Figure("x", 0.0, 10).kept


@pytest.mark.parametrize(("optional", "status"), [(True, 0), (False, 1)])
def test_a_missed_figure_is_told_and_fails_unless_it_is_of_something_optional(
    optional: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = [
        evaluate.Figure("kept", 0.99, 500, 0.99),
        evaluate.Figure("missed", 0.966, 500, 0.98, optional=optional),
    ]
    monkeypatch.setattr(command_line, "evaluate", lambda folder: figures)
    monkeypatch.setattr(sys, "argv", ["demo", "evaluate"])
    assert command_line.main() == status
    kept, missed = capsys.readouterr().out.splitlines()
    assert kept.split() == ["kept", "99.0%", "of", "500", "at", "least", "99.0%"]
    assert missed.split() == ["missed", "96.6%", "of", "500", "at", "least", "98.0%", "MISSED"]


def test_the_handwritten_prompts_hold_what_they_claim() -> None:
    rows = [json.loads(line) for line in evaluate.HANDWRITTEN.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 200
    for row in rows:
        assert row["ticker"] in row["prompt"]
        assert row["side"] in ("LONG", "SHORT", None)


def test_the_handwritten_corrections_are_proposals_as_the_server_shows_them() -> None:
    rows = [json.loads(line) for line in evaluate.CORRECTIONS.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 40
    for row in rows:
        correction = row["corrected_proposal"]
        proposals.Proposal.model_validate(correction)
        assert list(correction) == list(proposals.in_order(correction))
        assert correction["ticker"] in row["prompt"]


def test_numbers_are_compared_by_their_value() -> None:
    assert evaluate.numbers("191.10, 1,200 at 3.4 % and .5") == evaluate.numbers(
        "191.1 1200.0 3.40% 0.5"
    )
    assert evaluate.numbers("58.39") != evaluate.numbers("58.3")
    assert evaluate.numbers("no number") == set()


# The recipe, from end to end but short


def test_the_recipe_makes_folders_that_an_engine_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm_sidecar.demo", "train"]
    command += ["--scale", "0.0005", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for name in ("phi3", "hermes"):
        assert f"{name}: step" in done.stderr
        engine = load_engine(tmp_path / name, device="cpu")
        assert engine.context_length == 8192
        assert evaluate.propose(engine, "Long ABC, rsi 78")["rationale"]


# The models that are shipped


@pytest.fixture(scope="module")
def phi3() -> Engine:
    return load_engine(DEMO_DIR / "phi3", device="cpu")


def test_the_shipped_models_are_small() -> None:
    files = [path for name in ("phi3", "hermes") for path in (DEMO_DIR / name).rglob("*")]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_the_shipped_model_copies_unseen_tickers_and_tells_sides(phi3: Engine) -> None:
    rng = Random(9)
    drawn = [market.draw(rng, "held-out") for _ in range(100)]
    written = [evaluate.propose(phi3, case.prompt) for case in drawn]
    pairs = [(case.proposal, got) for case, got in zip(drawn, written, strict=True)]
    assert sum(right["ticker"] == got["ticker"] for right, got in pairs) >= 97
    assert sum(right.get("side") == got.get("side") for right, got in pairs) >= 95


def test_the_shipped_model_answers_the_prompt_and_not_an_example(phi3: Engine) -> None:
    examples = [proposals.Example(case.prompt, case.proposal) for case in cases(2)]
    request = GenerationRequest(
        proposals.build_messages("Long QZX from 100, RSI 81, overbought.", examples),
        proposals.MAX_COMPLETION_TOKENS,
        proposals.GUIDANCE,
    )
    text = "".join(delta.text for delta in phi3.stream(request))
    assert proposals.parse(text)["ticker"] == "QZX"


def test_the_shipped_hermes_prefers_more_reward_for_the_risk() -> None:
    hermes = load_engine(DEMO_DIR / "hermes", device="cpu")
    scores = []
    for target in (1.0, 2.0, 4.0, 8.0):
        proposal = answer("winner", "ABC", "LONG", None, None)
        proposal |= {"new_stop_pct": 2.0, "new_target_pct": target}
        messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, proposal)
        found = hermes.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
        assert sum(found.values()) > 0.9
        scores.append(hermes_plugin.expected_score(found))
    assert scores == sorted(scores)


def test_batches_of_one_width_have_one_shape() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    schedule = Schedule(tokens=10_000_000)
    found = list(itertools.islice(batches(tokenizer, market.teacher(7), schedule, []), 40))
    rows: dict[int, set[int]] = {}
    for batch in found:
        count, width = batch.ids.shape
        rows.setdefault(width, set()).add(count)
        longest = max(lesson.own for lesson in batch.lessons)
        assert width - max(16, width // 8) < longest <= width
    assert len(rows) > 1
    assert all(len(counts) == 1 for counts in rows.values())


def test_lessons_to_choose_from_are_single_prompts_that_come_once() -> None:
    teach = market.candidates(8)
    drawn = [teach(1.0) for _ in range(300)]
    assert all(
        [message["role"] for message in lesson.messages] == ["system", "user", "assistant"]
        for lesson in drawn
    )
    assert len({lesson.messages[1]["content"] for lesson in drawn}) > 297


def test_a_pool_has_room_for_hard_and_for_missed_lessons() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    schedule = Schedule(tokens=40_000, batch_tokens=500, again=0.2, mined=0.5)
    missed = drawn_lessons(tokenizer, market.candidates(1), 1.0, 20_000)
    hard: list[Encoded] = []
    pools = 0

    def mine(tokens: int) -> list[Encoded]:
        nonlocal pools
        pools += 1
        found = drawn_lessons(tokenizer, market.candidates(pools + 1), 1.0, tokens)
        hard.extend(found)
        return found

    kept = [*missed]
    given: list[Encoded] = []
    for batch in batches(tokenizer, market.revision(7), schedule, missed, mine):
        if pools == 2:
            break
        given += batch.lessons
    assert missed == []

    def share(some: list[Encoded]) -> float:
        those = set(map(id, some))
        tokens = sum(lesson.own for lesson in given if id(lesson) in those)
        return tokens / sum(lesson.own for lesson in given)

    assert 0.15 < share(kept) < 0.3
    assert 0.4 < share(hard) < 0.65


@pytest.mark.parametrize("name", ["phi3", "hermes"])
def test_training_reckons_what_transformers_does(name: str) -> None:
    torch.manual_seed(4)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    model = (
        Phi3ForCausalLM(Phi3Config(**shape))
        if name == "phi3"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    prepare_attention(model)
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.ndim == 2:
                matrix.copy_(rounded(matrix))
    shared, ids = torch.randint(2, 128, (9,)), torch.randint(2, 128, (3, 20))
    rows, places = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 7, 3, 19])
    whole = torch.cat((shared.expand(3, -1), ids), 1)
    target = torch.randn(4, 128)

    model.set_attn_implementation("eager")
    expected = model(input_ids=whole, output_attentions=True)
    (expected.logits[rows, len(shared) + places] * target).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    held = hold(model, int4=True)
    states = forward(model, held, shared, ids, rows, places, looking=True)
    found = logits(held, states)
    (found * target).sum().backward()  # type: ignore[no-untyped-call]

    # As far as bfloat16 has it.
    torch.testing.assert_close(
        found.float(), expected.logits[rows, len(shared) + places], atol=0.06, rtol=0.06
    )
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        cosine = torch.nn.functional.cosine_similarity(
            parameter.grad.flatten(), gradient.flatten(), 0
        )
        assert cosine > 0.999
        assert 0.98 < parameter.grad.norm() / gradient.norm() < 1.02
    for layer in range(2):
        seen = attention(*states.looks[layer], rows, places)
        right = expected.attentions[layer][rows, :, len(shared) + places]
        torch.testing.assert_close(seen, right, atol=0.02, rtol=0)
    with torch.no_grad():
        again = logits(held, forward(model, held, shared, ids, rows, places))
    torch.testing.assert_close(again, found.detach(), atol=0.06, rtol=0.06)


def small_phi3(tokenizer: Any) -> Phi3ForCausalLM:
    """One layer of 32, random."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return Phi3ForCausalLM(
        Phi3Config(
            **shape,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def test_what_the_user_says_is_learned_too_without_the_padding() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    model = small_phi3(tokenizer)
    teach = market.candidates(6)
    drawn = [encode(tokenizer, teach(1.0)) for _ in range(12)]
    width = max(lesson.own for lesson in drawn) + 5
    batch = padded(drawn, width, tokenizer.pad_token_id)
    with torch.no_grad():
        held = hold(model, int4=False)
        found = _losses(model, held, batch, speaking=True).spoken.mean()
        expected: list[float] = []
        for lesson in drawn:
            ids = torch.tensor([lesson.ids])
            logits = model(input_ids=ids).logits[0, lesson.shared : -1]
            following = ids[0, lesson.shared + 1 :]
            each = torch.nn.functional.cross_entropy(logits, following, reduction="none")
            labels = lesson.labels[lesson.shared + 1 :]
            expected += [
                loss for loss, label in zip(each.tolist(), labels, strict=True) if label == IGNORED
            ]
    expected = expected[::3]
    expected = expected[: len(expected) // 128 * 128]
    assert len(expected) >= 128
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=0.01)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    model = small_phi3(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    teach = market.teacher(1)
    with pytest.raises(FloatingPointError, match="the loss of phi3 is nan in step 1"):
        # Without hints, as this model has not the heads that they are for.
        train(model, tokenizer, lambda _: teach(1.0)._replace(hints=()), Schedule(500), "phi3")


def test_the_rate_rises_at_once_and_falls_to_its_least_which_the_second_round_begins_with() -> None:
    first, second = recipe._PHI3, recipe._REVISION
    assert first.rate(0.0) < 0.02
    rates = [first.rate(progress / 50) for progress in range(1, 51)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.99
    assert rates[-1] * first.matrix_rate == pytest.approx(second.matrix_rate)
    assert rates[-1] * first.other_rate == pytest.approx(second.other_rate)
    assert second.rate(1.0) == pytest.approx(0.02)


def test_hard_cases_are_given_three_times_at_most_and_none_is_longer_than_asked() -> None:
    given = market._Cases(Random(2), "train")
    found = [given.give(70 if number < 1500 else 200) for number in range(5000)]
    assert max(len(case.prompt) for case in found[:1500]) <= 70
    counts = collections.Counter(case.prompt for case in found)
    hard = {case.prompt for case in found if market._is_hard(case)}
    assert {counts[prompt] for prompt in hard} == {1, 2, 3}
    # A short one may be drawn again.
    once = sum(counts[prompt] == 1 for prompt in counts.keys() - hard)
    assert once > 0.98 * len(counts.keys() - hard)


def test_the_hardest_lessons_are_those_with_the_greatest_loss_of_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    model = small_phi3(tokenizer)
    chosen = _hardest(model, tokenizer, market.candidates(5), 3000)
    assert 2000 < sum(lesson.own for lesson in chosen) <= 3000

    teach = market.candidates(5)
    drawn: list[Encoded] = []
    while sum(lesson.own for lesson in drawn) < 12_000:
        drawn.append(encode(tokenizer, teach(1.0)))
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.ndim == 2:
                matrix.copy_(rounded(matrix))
        losses = {}
        for lesson in drawn:
            logits = model(input_ids=torch.tensor([lesson.ids])).logits[0, :-1]
            labels = torch.tensor(lesson.labels[1:])
            each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            losses[tuple(lesson.ids)] = each.max().item()
    hard = {tuple(lesson.ids) for lesson in chosen}
    easiest = min(losses[ids] for ids in hard)
    assert all(loss < easiest + 0.05 for ids, loss in losses.items() if ids not in hard)
    assert max(losses.values()) > min(losses.values()) + 0.2

"""LoRA adapters on onnxruntime-genai: made of PEFT's, swapped, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_sidecar.conversion import ConversionFailed
from llm_sidecar.engines import Engine, GenerationRequest, Message, load_engine
from llm_sidecar.engines.lora_graph import ADAPTER_FILE, read_lora_graph
from llm_sidecar.engines.lora_graph import write_adapter as write_matrices
from llm_sidecar.engines.peft_files import CONFIG_FILE, WEIGHTS_FILE
from llm_sidecar.errors import AdapterRejected
from llm_sidecar.lora import convert_adapter
from tests.random_models import convert_to_onnx, write_adapter, write_transformers_folder

CHAT = [Message(role="user", content="Long ABC from 100, now 112.5.")]
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("phi3", {}),
    "everything": ("phi3", {"target_modules": "all-linear", "r": 8, "lora_alpha": 4}),
    "of several ranks": (
        "phi3",
        {
            "target_modules": ["o_proj", "gate_up_proj"],
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {"o_proj": 5},
        },
    ),
    "apart": ("llama", {"target_modules": SEPARATE, "use_rslora": True}),
    "of keys alone": ("llama", {"target_modules": ["k_proj"]}),
    "of one layer": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
}


@pytest.fixture(scope="module")
def models(
    random_phi3_torch: Path, random_hermes_torch: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """A Phi-3 and a Llama: for transformers, and for onnxruntime-genai in float32."""
    folder = tmp_path_factory.mktemp("models")
    sources = {"phi3": random_phi3_torch, "llama": random_hermes_torch}
    return {
        name: (source, convert_to_onnx(source, folder / name, "fp32"))
        for name, source in sources.items()
    }


@pytest.fixture(scope="module")
def adapters(
    models: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two good ones for the Phi-3: 20260101 and 20260102."""
    folder = tmp_path_factory.mktemp("adapters")
    source, base = models["phi3"]
    for day, rank in ((1, 4), (2, 6)):
        peft = write_adapter(source, folder / f"peft{day}", seed=day, r=rank)
        convert_adapter(peft, base, folder / f"2026010{day}")
    return folder


def answer(engine: Engine) -> str:
    request = GenerationRequest(CHAT, 24)
    return "".join(delta.text for delta in engine.stream(request))


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_answers_as_it_does_on_torch(
    case: str, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    architecture, settings = SETTINGS[case]
    source, base = models[architecture]
    peft = write_adapter(source, tmp_path / "peft", **settings)
    out = tmp_path / "deep" / "20260101"
    moved = convert_adapter(peft, base, out)
    assert moved > 0.01
    assert {path.name for path in out.iterdir()} == {CONFIG_FILE, ADAPTER_FILE}
    assert list(out.parent.iterdir()) == [out]
    ours = load_engine(base, device="cpu", adapter=out)
    torch = load_engine(source, device="cpu", adapter=peft)
    for text in ("Long ABC from 100, now 112.5.", "?", "Kurz: QX fällt. " * 30):
        chat = [Message(role="user", content=text)]
        found, expected = ours.next_token(chat)[1], torch.next_token(chat)[1]
        assert np.abs(found - expected).max() < 1e-4


def test_an_adapter_of_zeros_changes_nothing_to_the_last_bit(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    _, base = models["phi3"]
    name, projection = next(iter(read_lora_graph(base / "model.onnx").projections.items()))
    zeros = np.zeros((projection.inputs, 3), np.float32), np.zeros((3, projection.outputs), "f4")
    write_matrices(tmp_path / ADAPTER_FILE, {name: zeros})
    plain = load_engine(base, device="cpu").next_token(CHAT)[1]
    ours = load_engine(base, device="cpu", adapter=tmp_path).next_token(CHAT)[1]
    assert (plain == ours).all()


def test_adapters_are_swapped_without_loading_the_model_again(
    models: dict[str, tuple[Path, Path]], adapters: Path
) -> None:
    _, base = models["phi3"]
    names = ("20260101", "20260102")
    alone = {n: answer(load_engine(base, device="cpu", adapter=adapters / n)) for n in names}
    assert alone["20260101"] != alone["20260102"]
    engine = load_engine(base, device="cpu", adapter=adapters / "20260101")
    for name in ("20260102", "20260101", "20260101", "20260102"):
        engine.use_adapter(adapters / name)
        assert answer(engine) == alone[name]


def test_an_answer_that_has_begun_is_ended_before_a_swap(
    models: dict[str, tuple[Path, Path]], adapters: Path
) -> None:
    engine = load_engine(models["phi3"][1], device="cpu", adapter=adapters / "20260101")
    expected = answer(engine)
    begun = engine.stream(GenerationRequest(CHAT, 24))
    next(begun)
    begun.close()
    engine.use_adapter(adapters / "20260102")
    assert answer(engine) != expected


def halved(folder: Path) -> None:
    content = (folder / ADAPTER_FILE).read_bytes()
    (folder / ADAPTER_FILE).write_bytes(content[: len(content) // 2])


def of_another_width(folder: Path) -> None:
    matrices = np.ones((32, 2), np.float32), np.ones((2, 192), np.float32)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.0.attn.qkv_proj": matrices})


def of_another_model(folder: Path) -> None:
    matrices = np.ones((64, 2), np.float32), np.ones((2, 192), np.float32)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.7.attn.qkv_proj": matrices})


def of_two_ranks(folder: Path) -> None:
    matrices = np.ones((64, 2), np.float32), np.ones((3, 192), np.float32)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.0.attn.qkv_proj": matrices})


def in_another_precision(folder: Path) -> None:
    matrices = np.ones((64, 2), np.float16), np.ones((2, 192), np.float16)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.0.attn.qkv_proj": matrices})


def infinite(folder: Path) -> None:
    matrices = np.full((64, 2), np.inf, np.float32), np.ones((2, 192), np.float32)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.0.attn.qkv_proj": matrices})


def overflowing(folder: Path) -> None:
    matrices = np.full((64, 2), 1e30, np.float32), np.full((2, 192), 1e30, np.float32)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.0.attn.qkv_proj": matrices})


def no_matrix(folder: Path) -> None:
    matrices = np.ones(64, np.float32), np.ones((2, 192), np.float32)
    write_matrices(folder / ADAPTER_FILE, {"model.layers.0.attn.qkv_proj": matrices})


def missing(folder: Path) -> None:
    (folder / ADAPTER_FILE).unlink()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (missing, "llm_sidecar.loader adapter"),
        (halved, "a part of one"),
        (of_another_width, "32 wide"),
        (of_another_model, "layers.7"),
        (of_two_ranks, "layers.0.attn.qkv_proj differ"),
        (in_another_precision, "float16"),
        (infinite, "infinities"),
        (no_matrix, "is no matrix"),
        (overflowing, "no numbers"),
    ],
)
def test_a_bad_adapter_is_refused_and_the_old_one_goes_on(
    spoil: Callable[[Path], None],
    why: str,
    models: dict[str, tuple[Path, Path]],
    adapters: Path,
    tmp_path: Path,
) -> None:
    bad = shutil.copytree(adapters / "20260102", tmp_path / "20260103")
    spoil(bad)
    engine = load_engine(models["phi3"][1], device="cpu", adapter=adapters / "20260101")
    expected = answer(engine)
    with pytest.raises(AdapterRejected, match=why):
        engine.use_adapter(bad)
    assert answer(engine) == expected
    with pytest.raises(AdapterRejected, match=why):
        load_engine(models["phi3"][1], device="cpu", adapter=bad)


def test_a_model_without_an_adapter_has_no_room_for_one(
    models: dict[str, tuple[Path, Path]], adapters: Path
) -> None:
    engine = load_engine(models["phi3"][1], device="cpu")
    with pytest.raises(AdapterRejected, match="without room"):
        engine.use_adapter(adapters / "20260101")


def rewritten(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"alora_invocation_tokens": [3, 4]}, "alora"),
        ({"peft_type": "PREFIX_TUNING"}, "not that of a LoRA"),
    ],
)
def test_what_is_more_than_lora_is_refused(
    setting: dict[str, Any], why: str, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, base = models["phi3"]
    peft = rewritten(write_adapter(source, tmp_path / "peft"), **setting)
    with pytest.raises(ConversionFailed, match=why):
        convert_adapter(peft, base, tmp_path / "20260101")
    assert list(tmp_path.iterdir()) == [peft]
    with pytest.raises(AdapterRejected, match=why):
        load_engine(source, device="cpu", adapter=peft)


def test_torch_lets_no_adapter_write_over_the_model(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = models["phi3"]
    good, bad = (write_adapter(source, tmp_path / name) for name in ("good", "bad"))
    head = {"base_model.model.lm_head.weight": np.ones((512, 64), np.float32)}
    save_file(load_file(bad / WEIGHTS_FILE) | head, bad / WEIGHTS_FILE)
    engine = load_engine(source, device="cpu", adapter=good)
    expected = answer(engine)
    with pytest.raises(AdapterRejected, match="no matrix of LoRA"):
        engine.use_adapter(bad)
    assert answer(engine) == expected
    (bad / WEIGHTS_FILE).write_bytes(b"no")
    with pytest.raises(AdapterRejected, match="cannot be read"):
        engine.use_adapter(bad)
    other = write_transformers_folder(tmp_path / "other", hidden_size=128)
    with pytest.raises(AdapterRejected, match="does not fit"):
        engine.use_adapter(write_adapter(other, tmp_path / "wide"))
    assert answer(engine) == expected


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": None}, {"lora_alpha": "much"}, {"alpha_pattern": {"(": 3}}]
)
def test_an_alpha_that_is_none_is_said(
    settings: dict[str, Any], models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, base = models["phi3"]
    peft = rewritten(write_adapter(source, tmp_path / "peft"), **settings)
    with pytest.raises(ConversionFailed, match="no alpha"):
        convert_adapter(peft, base, tmp_path / "20260101")


def test_what_cannot_be_converted_is_said_and_leaves_nothing(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, base = models["phi3"]
    peft, out = write_adapter(source, tmp_path / "peft"), tmp_path / "20260101"

    def failure(peft: Path, base: Path) -> str:
        with pytest.raises(ConversionFailed) as caught:
            convert_adapter(peft, base, out)
        assert not out.exists()
        return caught.value.detail

    other = write_adapter(source, tmp_path / "other")
    tensors = load_file(other / WEIGHTS_FILE) | {"base_model.model.lm_head.bias": np.zeros(8, "f4")}
    save_file(tensors, other / WEIGHTS_FILE)
    assert "no matrix of LoRA" in failure(other, base)
    assert "on torch" in failure(peft, source)
    assert CONFIG_FILE in failure(tmp_path, base)
    deeper = write_transformers_folder(tmp_path / "deeper", hidden_size=128)
    wide = write_adapter(deeper, tmp_path / "wide")
    assert "another width" in failure(wide, base)
    (peft / WEIGHTS_FILE).write_bytes((peft / WEIGHTS_FILE).read_bytes()[:100])
    assert "cannot be read" in failure(peft, base)
    (peft / CONFIG_FILE).write_text("[")
    assert "no JSON" in failure(peft, base)
    (peft / WEIGHTS_FILE).unlink()
    assert WEIGHTS_FILE in failure(peft, base)
    out.mkdir()
    with pytest.raises(ConversionFailed, match="already"):
        convert_adapter(peft, base, out)


def test_the_command_converts_for_the_configured_model(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, base = models["phi3"]
    peft = write_adapter(source, tmp_path / "peft")
    command = [sys.executable, "-m", "llm_sidecar.loader", "adapter", str(peft)]
    environ = {"MICRO_LLM_MODEL_PATH": str(base / "model.onnx"), "PATH": ""}

    def run() -> tuple[int, str]:
        done = subprocess.run(
            [*command, str(tmp_path / "20260101")],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    status, said = run()
    assert (status, said.count("\n")) == (0, 1), said
    assert "20260101 moves the next tokens of phi3/" in said
    status, said = run()
    assert status == 1
    assert said.endswith("already; name another folder or remove it\n")

"""LoRA adapters on onnxruntime: converted from PEFT, swapped, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_sidecar.engines import Engine, GenerationRequest, Message, load_engine
from llm_sidecar.engines.lora_graph import ADAPTER_FILE, read_lora_graph
from llm_sidecar.engines.lora_graph import write_adapter as write_matrices
from llm_sidecar.engines.peft_files import CONFIG_FILE, WEIGHTS_FILE
from llm_sidecar.errors import AdapterRejected
from llm_sidecar.loader import __main__ as loader_cli
from llm_sidecar.models import files, patterns
from llm_sidecar.models.conversion import ConversionFailed
from llm_sidecar.models.lora import convert_adapter
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
    """A Phi-3 and a Llama: for transformers, and for onnxruntime in float32."""
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


def no_file(folder: Path) -> None:
    missing(folder)
    # Reading a FIFO waits for a writer.
    os.mkfifo(folder / ADAPTER_FILE)


def huge(folder: Path) -> None:
    os.truncate(folder / ADAPTER_FILE, 1 << 40)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (missing, "llm_sidecar.loader adapter"),
        (no_file, "llm_sidecar.loader adapter"),
        (huge, "larger than the weights that it may change"),
        (halved, "is incomplete"),
        (of_another_width, "32 wide"),
        (of_another_model, "layers.7"),
        (of_two_ranks, "layers.0.attn.qkv_proj differ"),
        (in_another_precision, "float16"),
        (infinite, "infinities"),
        (no_matrix, "is not a matrix"),
        (overflowing, "not finite numbers"),
    ],
)
def test_a_bad_adapter_is_refused(
    spoil: Callable[[Path], None],
    why: str,
    models: dict[str, tuple[Path, Path]],
    adapters: Path,
    tmp_path: Path,
) -> None:
    bad = shutil.copytree(adapters / "20260102", tmp_path / "20260103")
    spoil(bad)
    with pytest.raises(AdapterRejected, match=why):
        load_engine(models["phi3"][1], device="cpu", adapter=bad)


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
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
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


def with_a_head(folder: Path) -> None:
    head = {"base_model.model.lm_head.weight": np.ones((512, 64), np.float32)}
    save_file(load_file(folder / WEIGHTS_FILE) | head, folder / WEIGHTS_FILE)


def with_a_long_name(folder: Path) -> None:
    tensor = {"x" * 10_000: np.ones(1, np.float32)}
    save_file(load_file(folder / WEIGHTS_FILE) | tensor, folder / WEIGHTS_FILE)


def for_less_than_it_targets(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key: tensors[key] for key in tensors if ".0." in key}, folder / WEIGHTS_FILE)


def with_weights_that_are_none(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"no")


def with_a_fifo(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


def with_huge_weights(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 1 << 40)


def with_a_huge_config(folder: Path) -> None:
    os.truncate(folder / CONFIG_FILE, 100 << 20)


def with_a_deep_config(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[" * 500_000)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (with_a_head, "lm_head.weight, which is not a LoRA matrix"),
        (with_a_long_name, "xxx, which is not a LoRA matrix"),
        (for_less_than_it_targets, "do not both have"),
        (with_weights_that_are_none, "cannot be read"),
        (with_a_fifo, "holds no adapter_model.safetensors"),
        (with_huge_weights, "larger than the model"),
        (with_a_huge_config, "larger than 1 MB"),
        (with_a_deep_config, "is not JSON"),
    ],
)
def test_torch_refuses_an_adapter_that_is_no_lora_for_the_model(
    spoil: Callable[[Path], None],
    why: str,
    models: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    source, _ = models["phi3"]
    spoil(write_adapter(source, tmp_path / "peft"))
    with pytest.raises(AdapterRejected, match=why):
        load_engine(source, device="cpu", adapter=tmp_path / "peft")


def test_torch_refuses_an_adapter_of_another_width(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    other = write_transformers_folder(tmp_path / "other", hidden_size=128)
    wide = write_adapter(other, tmp_path / "wide")
    with pytest.raises(AdapterRejected, match="does not fit"):
        load_engine(models["phi3"][0], device="cpu", adapter=wide)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lora_alpha": None}, "has no alpha"),
        ({"lora_alpha": "much"}, "has no alpha"),
        ({"alpha_pattern": {"(": 3}}, "holds an invalid regular expression"),
        ({"alpha_pattern": ["o_proj"]}, "is not an object"),
    ],
)
def test_a_missing_or_invalid_alpha_is_refused_with_the_reason(
    settings: dict[str, Any],
    why: str,
    models: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    source, base = models["phi3"]
    peft = rewritten(write_adapter(source, tmp_path / "peft"), **settings)
    with pytest.raises(ConversionFailed, match=why):
        convert_adapter(peft, base, tmp_path / "20260101")
    assert list(tmp_path.iterdir()) == [peft]


def test_an_alpha_pattern_that_takes_for_ever_ends_at_the_bound(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    source, base = models["phi3"]
    settings = {"alpha_pattern": {r"((\w|\.)+)+!": 3}}
    peft = rewritten(write_adapter(source, tmp_path / "peft"), **settings)
    with pytest.raises(ConversionFailed) as caught:
        convert_adapter(peft, base, tmp_path / "20260101")
    assert caught.value.detail == (
        f"{peft}: alpha_pattern in adapter_config.json cannot be matched within 0.5 s"
    )


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
    assert "not a LoRA matrix" in failure(other, base)
    assert "on torch" in failure(peft, source)
    assert CONFIG_FILE in failure(tmp_path, base)
    deeper = write_transformers_folder(tmp_path / "deeper", hidden_size=128)
    wide = write_adapter(deeper, tmp_path / "wide")
    assert "another width" in failure(wide, base)
    (peft / WEIGHTS_FILE).write_bytes((peft / WEIGHTS_FILE).read_bytes()[:100])
    assert "cannot be read" in failure(peft, base)
    (peft / CONFIG_FILE).write_text("[")
    assert "not JSON" in failure(peft, base)
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
    assert "20260101 changes the probabilities of phi3/" in said
    status, said = run()
    assert status == 1
    assert said.endswith("already exists; name another folder or remove it\n")


@pytest.fixture(scope="module")
def demo_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of the demo model's shape."""
    folder = tmp_path_factory.mktemp("demo-peft")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["qkv_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = json.loads((files.DEMO_DIR / "phi3" / "genai_config.json").read_text())["model"]
    width, layers = model["decoder"]["hidden_size"], model["decoder"]["num_hidden_layers"]
    random = np.random.default_rng(1)
    matrices = {
        f"base_model.model.model.layers.{layer}.self_attn.qkv_proj.lora_{name}.weight": (
            random.normal(0, 0.1, shape).astype(np.float32)
        )
        for layer in range(layers)
        for name, shape in (("A", (2, width)), ("B", (3 * width, 2)))
    }
    save_file(matrices, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("variable", [None, "MICRO_LLM_MODEL_PATH", "--model"])
def test_the_command_converts_for_the_demo_where_no_model_is_named(
    demo_peft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str | None,
) -> None:
    """As `make serve` runs the demo model where no model is configured."""
    for name in ("MICRO_LLM_MODEL_PATH", "SIDECAR_DEMO"):
        monkeypatch.delenv(name, raising=False)
    command = ["adapter", str(demo_peft), str(tmp_path / "20260101")]
    missing = str(tmp_path / "missing")
    if variable == "--model":
        command += ["--model", missing]
    elif variable is not None:
        monkeypatch.setenv(variable, missing)
    status = loader_cli.main(command)
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    if variable is None:
        assert status == 0
        assert "changes the probabilities of phi3/demo's next tokens by" in output.out
        assert output.err.endswith("so the adapter is for the demo model.\n")
    else:
        assert (status, output.out) == (1, "")
        assert f"{missing} does not exist" in output.err

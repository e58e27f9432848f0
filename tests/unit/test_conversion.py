"""Which result of a conversion is kept; with made-up numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.conversion import (
    ConversionFailed,
    Precision,
    convert,
    pipeline,
    resources,
)
from llm_sidecar.models.conversion.options import INT4, INT8, Option
from llm_sidecar.models.conversion.quality import Measurement, Quality, compare, rank_correlation

GREEDY = list(range(10))
SCORES = [1.0, 2.0, 3.0]


def measured(perplexity: float, greedy: list[int] = GREEDY, text: str = "t") -> Measurement:
    return Measurement(text, 10, perplexity, greedy, SCORES)


def write_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    """A file of zeros in bfloat16."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for width in shape:
            size *= width
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A transformers folder, as far as it is read here."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    write_safetensors(folder / "model.safetensors", {"a": [4, 8], "b": [16]})
    return folder


class Steps:
    """The steps of a conversion, with scripted measurements.

    Attributes:
        results: of each measurement, the source's first.
        quantized: the options that were tried.
        options: of the builder.
    """

    def __init__(self, *results: Measurement) -> None:
        self.results: Iterator[Measurement] = iter(results)
        self.quantized: list[Option] = []
        self.options: dict[str, str] | None = None

    def build(
        self, source: Path, out: Path, precision: str, report: object, options: dict[str, str]
    ) -> int:
        assert precision == "fp32"
        self.options = options
        self._write(out)
        return 3

    def quantize(self, base: Path, out: Path, option: Option) -> int:
        assert (base / "model.onnx").is_file()
        self.quantized.append(option)
        self._write(out)
        return 2

    def prune(self, graph: Path) -> None:
        graph.write_text("pruned graph")

    def measure(self, folder: Path, threads: int) -> tuple[Measurement, int]:
        assert threads == 1
        return next(self.results), 1

    def _write(self, out: Path) -> None:
        out.mkdir()
        (out / "model.onnx").write_text("graph")
        (out / "model.onnx.data").write_text("weights")


def use(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> Steps:
    monkeypatch.setattr(pipeline, "build", steps.build)
    monkeypatch.setattr(pipeline, "steps", steps)
    return steps


def test_the_first_option_that_is_good_enough_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = use(monkeypatch, Steps(measured(10.0), measured(14.0), measured(10.4)))
    out = tmp_path / "deep" / "out"
    conversion = convert(source, out, "int4")
    assert steps.quantized == list(INT4[:2])
    assert steps.options == {"shared_embeddings": "false"}
    assert conversion.kept.name == INT4[1].name
    assert [trial.refusal for trial in conversion.trials] == [
        "its perplexity is 1.400 times that of the source",
        None,
    ]
    assert not conversion.fallback
    assert sorted(file.name for file in out.iterdir()) == [
        "conversion.json",
        "model.onnx",
        "model.onnx.data",
        "transformers",
    ]
    assert (out / "model.onnx").read_text() == "pruned graph"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_result_keeps_sampling_and_prompts_and_links_to_its_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    use(monkeypatch, Steps(measured(10.0), measured(10.0)))
    for name in ("generation_config.json", "prompts.json"):
        (source / name).write_text(f"the {name} of the source")
    monkeypatch.chdir(tmp_path)
    convert(Path("source"), Path("deep/out"), precision)
    for name in ("generation_config.json", "prompts.json"):
        assert (tmp_path / "deep" / "out" / name).read_text() == f"the {name} of the source"
    assert (tmp_path / "deep" / "out" / "transformers").readlink() == source


def test_the_record_holds_what_was_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Steps(measured(10.0), measured(10.1)))
    convert(source, tmp_path / "out", "int8")
    record = json.loads((tmp_path / "out" / "conversion.json").read_bytes())
    assert len(record["source"].pop("model_files")) == 64
    assert len(record["source"].pop("tokenizer_files")) == 64
    assert record["versions"].keys() == {
        "onnxruntime",
        "onnxruntime-genai",
        "tokenizers",
        "torch",
        "transformers",
    }
    del record["versions"]
    size = (source / "model.safetensors").stat().st_size
    assert record == {
        "source": {"bytes": size, "perplexity": 10.0, "tokens": 10, "text": "t"},
        "precision": "int8",
        "max_perplexity_ratio": 1.05,
        "kept": "int8, blocks of 32",
        "trials": [
            {
                "name": "int8, blocks of 32",
                "size": 12,
                "perplexity": 10.1,
                "quality": {"perplexity_ratio": 1.01, "equal_greedy": 1.0, "score_ranks": 1.0},
                "refusal": None,
            }
        ],
        "peak_memory_bytes": {"building": 3, "measuring": 1, "quantizing": 2},
    }


def test_int8_is_kept_where_no_int4_is_good_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [measured(11.0) for _ in INT4]
    steps = use(monkeypatch, Steps(measured(10.0), *bad, measured(10.05)))
    conversion = convert(source, tmp_path / "out", "int4")
    assert steps.quantized == [*INT4, *INT8]
    assert conversion.kept.name == "int8, blocks of 32"
    assert conversion.fallback


def test_nothing_is_kept_where_nothing_is_good_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = [measured(12.0 + number) for number in range(len(INT4))]
    use(monkeypatch, Steps(measured(10.0), *worse, measured(11.0)))
    with pytest.raises(ConversionFailed) as failure:
        convert(source, tmp_path / "out", "int4")
    assert failure.value.detail == (
        "no result is good enough. The closest is int8, blocks of 32: its perplexity is 1.100 "
        "times that of the source; at most 1.05 is accepted (--max-perplexity-ratio)"
    )
    assert list(tmp_path.iterdir()) == [source]


def test_a_larger_ratio_keeps_more(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = use(monkeypatch, Steps(measured(10.0), measured(14.0)))
    convert(source, tmp_path / "out", "int4", max_perplexity_ratio=1.4)
    assert steps.quantized == [INT4[0]]


def test_float32_is_measured_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = use(monkeypatch, Steps(measured(10.0), measured(10.0)))
    conversion = convert(source, tmp_path / "out", "fp32")
    assert steps.quantized == []
    assert steps.options == {}
    assert conversion.kept.name == "float32"
    use(monkeypatch, Steps(measured(10.0), measured(10.0, greedy=[9] * 10)))
    with pytest.raises(ConversionFailed, match=r"equal greedy tokens is only 0\.100"):
        convert(source, tmp_path / "other", "fp32")


def test_other_tokens_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Steps(measured(10.0), measured(10.0, text="other")))
    with pytest.raises(ConversionFailed, match="splits text differently"):
        convert(source, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == [source]


def test_needs_are_said_and_checked_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(resources, "free_memory", lambda: 1000)
    with pytest.raises(ConversionFailed, match="and 0 MB are free; convert on a machine with more"):
        convert(source, tmp_path / "deep" / "out", "int4", said.append)
    assert said == ["Converting takes up to 734 MB of memory and 0 MB of disk"]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", '{"quantization_config": {"quant_method": "gptq"}}', "already (gptq)"),
        ("model.safetensors", "short", "not a safetensors file, or incomplete"),
        ("model.safetensors", '\5\0\0\0\0\0\0\0"abc"', "not a safetensors file, or incomplete"),
    ],
)
def test_a_source_that_cannot_be_converted_is_refused(
    source: Path, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    (source / name).write_text(content)
    with pytest.raises(ConversionFailed) as failure:
        convert(source, tmp_path / "out", "int4")
    assert reason in failure.value.detail


def test_a_source_needs_a_chat_template(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").unlink()
    with pytest.raises(ModelUnavailable, match="chat_template"):
        convert(source, tmp_path / "out", "int4")


def test_a_gguf_is_served_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConversionFailed, match="is a GGUF"):
        convert(tmp_path / "x.gguf", tmp_path / "out", "int4")


def test_the_table_shows_every_trial(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Steps(measured(10.0), measured(14.0), measured(10.4, greedy=[*GREEDY[:9], 0])))
    lines = convert(source, tmp_path / "out", "int4").table().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "weights",
        "the source",
        INT4[0].name,
        INT4[1].name,
    ]
    assert lines[2].endswith("refused: its perplexity is 1.400 times that of the source")
    assert lines[3].split()[-5:] == ["10.400", "1.040", "0.900", "1.000", "kept"]


def test_the_quality_is_that_of_the_result_against_the_source() -> None:
    first = Measurement("t", 4, 10.0, [1, 2, 3, 4], [0.0, 5.0, 7.0])
    second = Measurement("t", 4, 12.0, [1, 2, 0, 4], [1.0, 9.0, 2.0])
    assert compare(first, second) == Quality(1.2, 0.75, 0.5)


@pytest.mark.parametrize(
    ("quality", "refused"),
    [
        (Quality(1.05, 0.8, -1.0), False),
        (Quality(0.9, 1.0, 0.0), False),
        (Quality(1.0501, 1.0, 1.0), True),
        (Quality(1.0, 0.799, 1.0), True),
        (Quality(float("nan"), 1.0, 1.0), True),
        (Quality(1.0, float("nan"), 1.0), True),
    ],
)
def test_a_result_is_refused_by_perplexity_and_by_greedy_tokens(
    quality: Quality, refused: bool
) -> None:
    assert (quality.refusal(1.05) is not None) == refused


def test_the_rank_correlation_takes_the_mean_rank_of_equal_values() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    # By hand: ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.948683, abs=1e-6)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0

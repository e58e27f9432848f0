"""The tokenizers, as the runtime reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime_genai as og

from llm_sidecar.models.files import DEMO_DIR
from tests.demo_cases import cases
from training.demo_models.tokenizer import PHI3, train_tokenizer


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

    # In a chat, a message comes after the end of a line.
    text = "\nDCPI CPI, (CPI) 1CPI CPIX\nSELL|XSELL Sell AB.L"
    pieces = [tokenizer.decode([token]).strip() for token in runtime.encode(text)]
    assert " ".join(filter(None, pieces)).startswith("D C P I CPI , ( CPI ) 1 C P I C P I X SELL |")
    assert "".join(pieces).endswith("XSELLSellAB.L")
    for one in (text, *(f"\n{prompt}" for prompt in drawn)):
        ids = tokenizer.encode(one, add_special_tokens=False)
        assert [int(token) for token in runtime.encode(one)] == ids
        assert tokenizer.decode(ids) == one

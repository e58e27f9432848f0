"""`python -m tests.chatterbox.stand_in FOLDER`: a Chatterbox checkpoint of random weights.

It has every file of the real one, in the real shapes, but a T3 of one layer instead of thirty: a
hundredth of its size, and it still speaks, if only noise. `tests.chatterbox.worker` reads it.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.tts import ChatterboxTTS
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from llm_sidecar.tts import wav
from llm_sidecar.tts.chatterbox import BUILT_IN_VOICE
from llm_sidecar.tts.voice import Wav

LAYERS = 1


def use_few_layers() -> None:
    """Give the T3s that this process builds as many layers as the stand-in has."""
    LLAMA_CONFIGS["Llama_520M"]["num_hidden_layers"] = LAYERS


def write(folder: Path) -> None:
    """Write the checkpoint's files into a folder."""
    use_few_layers()
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    networks = {"ve": VoiceEncoder(), "t3_cfg": T3(), "s3gen": S3Gen()}
    for name, network in networks.items():
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    _write_tokenizer(folder / "tokenizer.json")
    _write_voice(folder)


def _write_tokenizer(path: Path) -> None:
    """One token a character, with the numbers that the package expects of its marks."""
    tokens = [chr(code) if 33 <= code < 127 else f"[{code}]" for code in range(256)]
    tokens[0], tokens[1], tokens[2], tokens[255] = "[STOP]", "[UNK]", "[SPACE]", "[START]"
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(r"\[SPACE\]|."), "isolated")
    tokenizer.save(str(path))


def _write_voice(folder: Path) -> None:
    """The built-in voice: what the package makes of a second or two of a siren."""
    model = ChatterboxTTS.from_local(folder, "cpu")
    seconds = torch.arange(38_400) / 24_000
    pitch = 220 + 60 * torch.sin(2 * math.pi * 3 * seconds)
    siren = 0.5 * torch.sin(2 * math.pi * torch.cumsum(pitch, 0) / 24_000)
    model.prepare_conditionals(_wav_file(siren), exaggeration=0.5)
    model.conds.save(folder / BUILT_IN_VOICE)


def _wav_file(samples: torch.Tensor) -> io.BytesIO:
    pcm = (samples * 32767).to(torch.int16).numpy()
    return io.BytesIO(wav.encode(Wav(pcm, 24_000)))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""Chatterbox, a voice that clones: https://github.com/resemble-ai/chatterbox.

The package's pins exclude those of the sidecar, so it mostly runs in a separate environment, as a
worker (`python -m llm_sidecar.tts`). `ChatterboxTTS` runs it in this process:

    voice = ChatterboxTTS("/models/tts/chatterbox", "auto", bus)
    wav = await voice.synth("Stop raised to 182.50.", exaggeration=0.7)
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from llm_sidecar.errors import InvalidRequest, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.settings import default_max_chars
from llm_sidecar.text import require_text
from llm_sidecar.tts import text as texts
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.reference import check_reference
from llm_sidecar.tts.voice import AUDIO_BYTES, Reference, Wav

SAMPLE_RATE: Final = 24_000
WEIGHTS: Final = ("ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors", "tokenizer.json")
BUILT_IN_VOICE: Final = "conds.pt"
"""The built-in voice; without this file every request needs a reference."""

SPEECH_TOKENS_AT_LEAST: Final = 50
SPEECH_TOKENS_PER_TEXT_TOKEN: Final = 12
"""Limit of the speech of a text, at 25 speech tokens a second: two seconds, and half a second for
each token of text, which is one letter or more, or a digit. Without it, a model that misses its
stop token would speak for forty seconds."""

T = TypeVar("T")


class ChatterboxTTS:
    """Chatterbox in this process; publishes its speech on the event bus.

    Args:
        model_dir: the folder of the weights.
        device: `auto`, `cpu` or `cuda`.
        event_bus: gets the WAV of each part, on `audio.bytes`, as soon as it is spoken.
    """

    def __init__(self, model_dir: str | Path, device: str, event_bus: EventBus) -> None:
        self._voice = ChatterboxVoice(model_dir, device)
        self._bus = event_bus
        self._slot = asyncio.Lock()

    async def synth(
        self, text: str, ref_wav: bytes | str | Path | None = None, exaggeration: float = 0.5
    ) -> bytes:
        """Speaks a text.

        Args:
            text: the text.
            ref_wav: a WAV file, or its path, whose voice to clone; None for the built-in voice.
            exaggeration: 0 (flat) to 2 (dramatic).

        Returns:
            One WAV file, 16-bit PCM, mono, 24 kHz.

        Raises:
            InvalidRequest: `text` is not text, is longer than MAX_PROMPT_CHARS or has nothing to
                speak; the reference is not a WAV; the exaggeration is out of range.
            VoiceUnavailable: the package or the weights are missing.
            SettingsError: MAX_PROMPT_CHARS is not valid.
        """
        require_text(default_max_chars(), text=text)
        if not texts.speakable(text):
            raise InvalidRequest("the text has nothing to say")
        reference = None if ref_wav is None else await asyncio.to_thread(_reference, ref_wav)
        spoken = []
        # One text at a time, so that the parts of two are never mixed on the bus.
        async with self._slot:
            speech = self._voice.speak(text, exaggeration=exaggeration, reference=reference)
            async for part in speech:
                file = wavs.encode(part)
                await self._bus.publish(AUDIO_BYTES, base64.b64encode(file).decode())
                spoken.append(part)
        if not spoken:
            raise InvalidRequest("the text has nothing to say")
        return wavs.encode(wavs.join(spoken))

    async def close(self) -> None:
        """Ends the current speech and frees the model."""
        await self._voice.close()


class ChatterboxVoice:
    """Chatterbox as a `Voice`: one generation at a time, in a thread of its own.

    Args:
        model_dir: the folder of the weights, read at the first use or by `load`.
        device: `auto` takes CUDA where torch finds it; `cpu`, `cuda`.
    """

    name = "chatterbox"
    clones = True
    sample_rate = SAMPLE_RATE

    def __init__(self, model_dir: str | Path, device: str = "auto") -> None:
        self._folder = Path(model_dir)
        self._device = device
        self._model: _Model | None = None
        # The model keeps state between its steps; a single thread serializes them.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chatterbox")

    async def load(self) -> None:
        """Loads the model, unless it is loaded.

        Raises:
            VoiceUnavailable: the package or weights are missing, or do not load.
        """
        await self._run(self._loaded)

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None, first: int = 0
    ) -> AsyncIterator[Wav]:
        """Speaks a text part by part; stops within a speech token if it is cancelled.

        Args:
            first: the number of the first part to speak.

        Raises:
            InvalidRequest: the exaggeration is not from 0 to 2, or the reference has no speech.
            VoiceUnavailable: as `load`; or no reference is given and there is no built-in voice.
        """
        if not 0 <= exaggeration <= 2:
            raise InvalidRequest("exaggeration is a number from 0 to 2")
        stop = threading.Event()
        try:
            model = await self._run(self._loaded)
            speaker = await self._run(partial(model.speaker, reference))
            for part in texts.split(text)[first:]:
                speech = await self._run(partial(model.speak, part, speaker, exaggeration, stop))
                yield wavs.soften(speech, pause=0.0)
        finally:
            stop.set()

    async def close(self) -> None:
        """Waits for the current step of the thread; cancels those that wait."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._model = None

    def _loaded(self) -> _Model:
        if self._model is None:
            self._model = _Model(self._folder, self._device)
        return self._model

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)


class _Stopped(Exception):
    """The speech was cancelled."""


class _Model:
    """The package; used by one thread."""

    def __init__(self, folder: Path, device: str) -> None:
        missing = [name for name in WEIGHTS if not (folder / name).is_file()]
        if missing:
            raise VoiceUnavailable(
                f"CHATTERBOX_MODEL_DIR={folder} lacks {', '.join(missing)}: it takes the folder of "
                "Chatterbox's weights"
            )
        # The libraries must download nothing at run time, and show no progress bars.
        os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
        try:
            import torch
            from chatterbox.tts import ChatterboxTTS as Package
        except ImportError as error:
            raise VoiceUnavailable(
                f"Chatterbox cannot be imported here ({error}): install "
                "requirements-chatterbox.txt in an environment of its own and run there "
                "python -m llm_sidecar.tts --voice chatterbox"
            ) from error
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise VoiceUnavailable("torch finds no CUDA device for Chatterbox: use auto or cpu")
        try:
            # Safetensors, JSON and, with weights_only, the tensors of conds.pt: no code is read.
            self._package = Package.from_local(folder, device)
        except Exception as error:
            raise VoiceUnavailable(
                f"Chatterbox does not load from CHATTERBOX_MODEL_DIR={folder}: {_line(error)}"
            ) from error
        self._built_in = self._package.conds
        self._t3 = self._package.t3 = _BoundedT3(self._package.t3)

    def speaker(self, reference: Reference | None) -> Any:
        """The conditionals of the reference's voice, or of the built-in voice."""
        if reference is None:
            if self._built_in is None:
                raise VoiceUnavailable(
                    f"Chatterbox has no built-in voice, which {BUILT_IN_VOICE} in "
                    "CHATTERBOX_MODEL_DIR would hold: send a reference"
                )
            return self._built_in
        try:
            # The package reads it with librosa, which treats a WAV that was written to a pipe as
            # empty. So it gets the checked samples. It accepts an open file as well as a path.
            file = io.BytesIO(wavs.encode(wavs.decode(reference.wav)))
            self._package.prepare_conditionals(file)
        except Exception as error:  # noqa: BLE001 - the package raises anything
            # The type only: the error's message may quote the file.
            name = type(error).__name__
            raise InvalidRequest(f"the reference cannot be used: {name}") from None
        return self._package.conds

    def speak(self, part: str, speaker: Any, exaggeration: float, stop: threading.Event) -> Wav:
        """One part of a text; raises _Stopped soon after `stop` is set."""
        # Otherwise the package speaks in the voice that it cloned last.
        self._package.conds = speaker
        self._t3.stop = stop
        speech = self._package.generate(part, exaggeration=exaggeration).squeeze(0).numpy()
        return Wav(wavs.pcm(speech), SAMPLE_RATE)


class _BoundedT3:
    """Chatterbox's model from text to speech tokens, with a limit, and with a way to stop it.

    The package lets it generate 1,000 tokens for any text.
    """

    def __init__(self, t3: Any) -> None:
        self.hp = t3.hp
        self.stop = threading.Event()
        self._t3 = t3

    def inference(self, *, text_tokens: Any, max_new_tokens: int, **options: Any) -> Any:
        bound = SPEECH_TOKENS_AT_LEAST + SPEECH_TOKENS_PER_TEXT_TOKEN * text_tokens.shape[-1]
        with self._t3.tfmr.register_forward_pre_hook(self._check):
            return self._t3.inference(
                text_tokens=text_tokens, max_new_tokens=min(max_new_tokens, bound), **options
            )

    def _check(self, *_: Any) -> None:
        if self.stop.is_set():
            raise _Stopped


def _reference(given: bytes | str | Path) -> Reference:
    try:
        data = given if isinstance(given, bytes) else Path(given).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"the reference cannot be read: {error.strerror}") from None
    return check_reference(data)


def _line(error: Exception) -> str:
    """An error's type and first line: load_state_dict's has hundreds."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"

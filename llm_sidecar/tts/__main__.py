"""`python -m llm_sidecar.tts`: a speech worker for the sidecars on the same Redis."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from redis.asyncio import Redis

from llm_sidecar import command_line
from llm_sidecar.errors import SettingsError
from llm_sidecar.event_bus.redis_url import MEMORY, close_client, make_client
from llm_sidecar.logs import log_to_stderr
from llm_sidecar.settings import Settings
from llm_sidecar.tts.chatterbox import ChatterboxVoice
from llm_sidecar.tts.worker import SpeechWorker

log = logging.getLogger("llm_sidecar.tts")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command_line.run(lambda: _speak(_parser().parse_args(argv)))


def _speak(options: argparse.Namespace) -> None:
    settings = Settings.from_environ()
    log_to_stderr(settings.telemetry.log_format)
    logging.getLogger().setLevel(logging.INFO)
    client = _client(settings.events.url.get_secret_value())
    voice = ChatterboxVoice(
        options.model_dir or settings.speech.chatterbox_dir,
        options.device or settings.models.device,
    )
    asyncio.run(_serve(client, voice))


def _parser() -> argparse.ArgumentParser:
    # Not typer: Chatterbox's environment should contain as few other packages as possible.
    parser = argparse.ArgumentParser(
        prog="python -m llm_sidecar.tts",
        description="Speaks for the sidecars on the same Redis, which REDIS_URL names.",
    )
    parser.add_argument("--voice", choices=("chatterbox",), default="chatterbox")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: DEVICE")
    parser.add_argument(
        "--model-dir", type=Path, help="folder of the weights; default: CHATTERBOX_MODEL_DIR"
    )
    return parser


def _client(url: str) -> Redis:
    if url.startswith(MEMORY):
        raise SettingsError("REDIS_URL=memory:// works in one process only; a worker needs a Redis")
    try:
        return make_client(url)
    except ValueError as error:
        raise SettingsError(f"REDIS_URL=*** is not valid: {error}") from None


async def _serve(client: Redis, voice: ChatterboxVoice) -> None:
    """Serves until a signal ends it."""
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        # Closed in reverse order: the worker before the client and the voice that it uses.
        stack.push_async_callback(voice.close)
        stack.push_async_callback(close_client, client)
        if not await _loaded(voice, stop):
            return
        worker = SpeechWorker(client, voice)
        stack.push_async_callback(worker.close)
        await worker.start()
        log.info("speech worker %s is ready", worker.worker_id)
        await stop.wait()


async def _loaded(voice: ChatterboxVoice, stop: asyncio.Event) -> bool:
    """Loads the voice; False if a signal came first."""
    loading = asyncio.create_task(voice.load())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([loading, stopped], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        return not stop.is_set()
    finally:
        loading.cancel()
        stopped.cancel()


if __name__ == "__main__":
    sys.exit(main())

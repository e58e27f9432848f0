"""The process that runs Piper: `python -m llm_sidecar.tts.piper_worker SOCKET FOLDER THREADS`.

It answers the messages of `piper_messages` on a socket that it inherits. It ends when the server
closes the socket, so it does not outlive the server.
"""

from __future__ import annotations

import contextlib
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts.piper_messages import Failed, Loaded, Speak, Speech
from llm_sidecar.tts.piper_model import PiperModel


def main() -> None:
    """Serves until the server closes the socket."""
    socket, folder, threads = sys.argv[1:]
    # The server has closed the socket.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(int(socket)), Path(folder), int(threads))


def _serve(connection: Connection, folder: Path, threads: int) -> None:
    try:
        model = PiperModel(folder, threads)
        # The first inference allocates its memory and loads espeak-ng.
        model.speak("The stop is raised to one hundred eighty-eight dollars.", 0.5)
    except VoiceUnavailable as error:
        connection.send(Failed(error.detail))
        return
    except Exception as error:  # noqa: BLE001 - the runtime raises bare ones
        connection.send(Failed(f"The Piper voice in {folder} fails: {type(error).__name__}"))
        return
    connection.send(Loaded())
    while True:
        connection.send(_answer(model, connection.recv()))


def _answer(model: PiperModel, request: Speak) -> Speech | Failed:
    try:
        return model.speak(request.text, request.exaggeration)
    except VoiceUnavailable as error:
        return Failed(error.detail)
    except Exception as error:  # noqa: BLE001 - the runtime raises bare ones
        # The type only: a message may quote the text.
        return Failed(f"The Piper voice failed on this text ({type(error).__name__}).")


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    main()

"""A local S3 server, whose conditional writes are atomic.

moto looks for an object and then stores it, in a thread for each request, so two writers could both
create it. One lock around all writes prevents that.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BUCKET = "osiris"
_ROOT = Path(__file__).resolve().parent.parent
_UNCONDITIONAL = "--unconditional"


class S3Server:
    """A server in a separate process, so that it can be stopped and killed.

    Args:
        unconditional: whether it ignores the conditions of writes, as some stores do.
    """

    def __init__(self, *, unconditional: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = [_UNCONDITIONAL] if unconditional else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3_server", str(self.port), *options],
            cwd=_ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def environ(self) -> dict[str, str]:
        """The usual variables of a client."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    async def wait(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.port), 1).close()
                    return
                await asyncio.sleep(0.05)

    async def create_bucket(self) -> None:
        """Waits for the server and creates `BUCKET`; it may exist already."""
        import boto3

        await self.wait()
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        await asyncio.to_thread(client.create_bucket, Bucket=BUCKET)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def _one_write_at_a_time(app: App, *, unconditional: bool) -> App:
    lock = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return app(environ, start_response)
        if environ.get("CONTENT_LENGTH"):
            # Without the lock, because the client may be slow.
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = io.BytesIO(body)
        if unconditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with lock:
            return list(app(environ, start_response))

    return serve


def main(port: str, *options: str) -> None:
    """Serves until it is killed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    os.environ["MOTO_PORT"] = port
    app = DomainDispatcherApplication(create_backend_app)
    serve = _one_write_at_a_time(app, unconditional=_UNCONDITIONAL in options)
    run_simple("127.0.0.1", int(port), serve, threaded=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

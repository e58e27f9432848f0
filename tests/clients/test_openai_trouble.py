"""The `openai` package while the sidecar is full or its worker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.clients.sidecar import KEY, MESSAGES, demo_sidecar
from tests.clients.test_openai import MANY
from tests.live_server import LiveServer


@pytest.fixture
def small(tmp_path: Path) -> Iterator[LiveServer]:
    """A sidecar with a queue of eight answers."""
    with demo_sidecar(tmp_path, QUEUE_LENGTH="8") as running:
        yield running


def test_a_full_queue_is_a_rate_limit_and_a_dead_worker_an_error_of_the_stream(
    small: LiveServer,
) -> None:
    client = OpenAI(base_url=f"{small.url}/v1", api_key=KEY, max_retries=0)
    worker = small.worker("hermes")
    stream = client.chat.completions.create(
        model="hermes", messages=MESSAGES, stream=True, max_tokens=400, response_format=MANY, n=8
    )
    next(stream)
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="hermes", messages=MESSAGES)
    assert caught.value.body["message"]
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError) as ended:
        list(stream)
    assert ended.value.body["message"]

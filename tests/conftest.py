"""Parts that many tests share: models of random weights, and a server on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, serve
from random_models import convert_to_onnx, write_transformers_folder


@pytest.fixture(scope="session")
def random_phi3_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a Phi-3 with random weights."""
    return write_transformers_folder(tmp_path_factory.mktemp("phi3-torch"))


@pytest.fixture(scope="session")
def random_phi3_onnx(random_phi3_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, converted to onnxruntime-genai in int4."""
    return convert_to_onnx(random_phi3_torch, tmp_path_factory.mktemp("phi3-onnx"))


@pytest.fixture(scope="session")
def random_llama_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a Llama with random weights."""
    return write_transformers_folder(tmp_path_factory.mktemp("llama"), architecture="llama")


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the demo models, an in-process bus and a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    with serve(folder, SIDECAR_DEMO="true", PRELOAD_MODELS="true") as server:
        server.wait_until_ready()
        yield server

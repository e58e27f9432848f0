"""Fixtures that many tests share: models with random weights, and a server on a free port."""

from __future__ import annotations

import fcntl
import functools
import gc
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live_server import LiveServer, serve
from tests.random_models import convert_to_onnx, write_transformers_folder
from tests.redis_server import RedisServer, require_redis

# The suite runs a process on each core. A second thread of torch would mostly wait, which takes as
# much of a processor as work.
os.environ["OMP_NUM_THREADS"] = "1"
# Otherwise each process that a test starts compiles its modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No garbage is worth looking for among the modules and tests that stay to the end. Collecting the
# tests takes a third less time.
gc.disable()


def pytest_collection_finish() -> None:
    """Looks for garbage again, but not among what is there by now."""
    gc.freeze()
    gc.enable()


TESTS = Path(__file__).parent
LONGEST = [
    TESTS / "long" / f"test_{name}.py"
    for name in ("remote", "db_crash", "openapi", "redis_trouble", "relay_under_faults", "replay")
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files of tests/long first and tests/unit, whose files are short, last: so
    both processes end at about the same time."""

    def position(item: pytest.Item) -> tuple[bool, int]:
        found = LONGEST.index(item.path) if item.path in LONGEST else len(LONGEST)
        return TESTS / "unit" in item.path.parents, found

    items.sort(key=position)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills. The processes of a run share it: the first one makes it."""
    base = factory.getbasetemp()
    # pytest-xdist gives each process a folder of its own in the folder of the run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            # What a process that failed has left.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def random_phi3_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a Phi-3 with random weights."""
    return made_once(tmp_path_factory, "phi3-torch", write_transformers_folder)


@pytest.fixture(scope="session")
def random_phi3_onnx(random_phi3_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, converted to onnxruntime-genai in int4."""
    return made_once(
        tmp_path_factory, "phi3-onnx", functools.partial(convert_to_onnx, random_phi3_torch)
    )


@pytest.fixture(scope="session")
def pruned_phi3_onnx(random_phi3_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a graph that computes the logits of the last position only."""

    def make(folder: Path) -> None:
        convert_to_onnx(random_phi3_torch, folder, "int4", ["prune_lm_head=true"])

    return made_once(tmp_path_factory, "phi3-pruned", make)


@pytest.fixture(scope="session")
def serial_phi3_onnx(random_phi3_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an architecture that onnxruntime-genai runs, one request at a time."""
    folder = shutil.copytree(random_phi3_onnx, tmp_path_factory.mktemp("phi3-serial") / "model")
    config = json.loads((folder / "genai_config.json").read_bytes())
    config["model"]["type"] = "phi"
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def random_hermes_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a Llama with random weights."""
    make = functools.partial(write_transformers_folder, architecture="llama")
    return made_once(tmp_path_factory, "hermes-torch", make)


@pytest.fixture(scope="session")
def random_hermes_onnx(random_hermes_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, converted to onnxruntime-genai: it loads in no time."""
    return made_once(
        tmp_path_factory, "hermes-onnx", functools.partial(convert_to_onnx, random_hermes_torch)
    )


@pytest.fixture(scope="session")
def random_models(random_phi3_onnx: Path, random_hermes_onnx: Path) -> dict[str, str]:
    """The environment that names two models of random weights, whose scores count anyway."""
    return {
        "MICRO_LLM_MODEL_PATH": str(random_phi3_onnx / "model.onnx"),
        "HERMES_MODEL_PATH": str(random_hermes_onnx),
        "MIN_ANSWER_MASS": "0",
    }


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """A real Redis that a module's tests share."""
    require_redis()
    with RedisServer() as redis:
        yield redis.url


@pytest.fixture(scope="module")
def server(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with models of random weights, an in-process bus and a database of its own."""
    with serve(tmp_path_factory.mktemp("server"), **random_models) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restores the level of the log, which commands set for their process."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)

"""README.md and the pages of docs/: their fenced blocks, headings and links."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Final, NamedTuple

from tests.live_server import ROOT

PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_FENCE: Final = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        location: its page and line.
        language: after the opening fence; empty for none.
        text: what is in it.
        shown: the language and text of the answer that follows a command; None without one.
    """

    location: str
    language: str
    text: str
    shown: tuple[str, str] | None = None


COMMANDS: Final = ("bash", "python")
NOT_RUN: Final = {
    # the first line of the block: why it is not run
    "make serve   # sets up .venv, then serves http://127.0.0.1:8000": "a server that stays",
    "make serve": "a server that stays",
    'make serve-ray RAY_OPTIONS="--phi3-min 2 --hermes-min 2"': (
        "a server that stays; tests/scale/test_ray.py runs it"
    ),
    "make serve-smollm2": "a server that stays; tests/long/test_gguf.py asks the same model",
    "MICRO_LLM_MODEL_PATH=.data/models/SmolLM2-135M-Instruct.Q4_1.gguf make serve-smollm2": (
        "a server that stays"
    ),
    "HERMES_MODEL_PATH=/srv/models/Hermes-3-Llama-3.1-8B.Q4_K_M.gguf make serve": (
        "a server that stays"
    ),
    "PHI3_URL=http://gpu-1:8000/v1 \\": "a server that stays",
    "make .env": "writes a password into the checkout",
    "ENABLE_METRICS=true LOG_FORMAT=text make serve": "a server that stays",
    "python -m osiris --host 127.0.0.1 --port 8000": "a server that stays",
    "MICRO_LLM_MODEL_PATH=/srv/models/cpu-int4-rtn-block-32-acc-level-4 \\": "needs real models",
    "SIDECAR_DEMO=true REDIS_URL=memory:// LANCEDB_URI=.data/lancedb \\": "a server that stays",
    "redis-cli -u redis://localhost:6379/0 psubscribe 'phi3.*'": "needs a Redis, waits for ever",
    "redis-cli -u redis://localhost:6379/0 xread count 100 streams osiris.events 0-0": (
        "needs a Redis"
    ),
    "redis-cli -u redis://localhost:6379/0 xadd osiris.inbox '*' id 1 type "
    "phi3.feedback.submitted data '{}'": "needs a Redis",
    ".venv/bin/python -m llm_sidecar.event_bus tail": "needs a Redis, waits for ever",
    ".venv/bin/python -m llm_sidecar.event_bus dead --full": "needs a Redis",
    "docker-compose up --build": "needs Docker",
    "docker-compose --profile scale up --build proxy": "needs Docker",
    "PHI3_HOST_DIR=/srv/models/phi3 HERMES_HOST_DIR=/srv/models/hermes docker-compose \\": (
        "needs Docker"
    ),
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://otel-collector:4318 \\": "needs Docker",
    "docker-compose exec llm-sidecar python -m llm_sidecar.db stats": "needs Docker",
    "docker-compose stop llm-sidecar": "needs Docker",
    "docker-compose run --rm --no-deps -T llm-sidecar tar -C /app/lancedb_data -xf - < "
    "lancedb.tar": "needs Docker",
    "CHATTERBOX_HOST_DIR=/srv/models/chatterbox docker-compose --profile speech up --build": (
        "needs Docker"
    ),
    "SIDECAR_TAG=0.3.0 docker-compose build": "needs Docker",
    "python3.11 -m venv .venv-chatterbox": "downloads 6 GB",
    ".venv/bin/python -m llm_sidecar.loader convert \\": "takes ten seconds; tests/long runs it",
    ".venv/bin/python -m llm_sidecar.loader adapter PEFT_DIR .data/adapters/20260102": (
        "needs a PEFT adapter"
    ),
    "pip install .": "installs into the environment of the tests; tests/long does it elsewhere",
    ".venv/bin/python -m tests.docs_tables": "writes into the checkout",
    "make test-unit   # tests/unit: less than half a minute": "runs this test",
    "pip install -r requirements-tests.txt": "downloads",
    "LIVE_TARGET=two .venv/bin/python -m pytest tests/live/test_routes.py": "runs these tests",
    ".venv/bin/python -m llm_sidecar.db replay 0d6c1f0e-2a51-4c46-9d4e-5a8f3d1b7a60": (
        "needs this proposal; tests/integration/test_replay.py replays others"
    ),
    "make bench": "takes minutes",
    ".venv-bench/bin/python -m benchmarks.capacity plan llm_sidecar/demo/phi3 --threads 1 "
    "--cores 16": "takes minutes",
    "make train": "takes an hour",
    ".venv/bin/python -m tests.mutants llm_sidecar.reward": "takes minutes",
}
"""Blocks that are not run; tests/integration/test_docs_not_run.py checks their commands."""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order. A `json` or `text` block that follows a command is its
    answer, and no block of its own."""
    source = page.read_text()
    found: list[Block] = []
    end_of_last = -1
    for match in _FENCE.finditer(source):
        language, text = match[2], textwrap.dedent(match[3])
        follows = end_of_last >= 0 and not source[end_of_last : match.start()].strip()
        end_of_last = match.end()
        if follows and language in ("json", "text") and found[-1].language in COMMANDS:
            found[-1] = found[-1]._replace(shown=(language, text))
            continue
        location = f"{page.relative_to(ROOT)}:{source.count(chr(10), 0, match.start()) + 1}"
        found.append(Block(location, language, text))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def all_blocks() -> list[Block]:
    """The fenced blocks of all pages."""
    return [block for page in PAGES for block in blocks(page)]


def is_run(block: Block) -> bool:
    """Whether tests/live/test_docs.py runs it."""
    return block.language in COMMANDS and first_line(block) not in NOT_RUN


def first_line(block: Block) -> str:
    """By which `NOT_RUN` names it."""
    return block.text.partition("\n")[0]

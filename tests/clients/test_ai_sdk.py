"""The AI SDK for JavaScript against the sidecar."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from tests.clients.sidecar import KEY

NODE: Final = Path(__file__).with_name("node")


def test_the_tests_in_javascript_pass(url: str) -> None:
    done = subprocess.run(
        ["node", "--test", "ai_sdk.test.mjs"],
        cwd=NODE,
        env={"PATH": os.environ["PATH"], "SIDECAR_URL": url, "SIDECAR_KEY": KEY},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

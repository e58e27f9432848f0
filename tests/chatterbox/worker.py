"""`python -m tests.chatterbox.worker`: `python -m llm_sidecar.tts`, for a T3 of few layers."""

from __future__ import annotations

import runpy

from tests.chatterbox.stand_in import use_few_layers

if __name__ == "__main__":
    use_few_layers()
    runpy.run_module("llm_sidecar.tts", run_name="__main__", alter_sys=True)

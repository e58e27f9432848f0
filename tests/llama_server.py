"""A llama-server for tests: its command line, over the server of the wheel `xllamacpp`."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

PROCESS = Path(__file__).resolve().parents[1] / "llm_sidecar" / "engines" / "llama_process.py"


def main() -> None:
    """Serves until it is killed; an unknown option is an error, as in the real one."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", choices=["0"], required=True)
    parser.add_argument("--ctx-size", dest="context", type=int, required=True)
    parser.add_argument("--parallel", dest="slots", type=int, required=True)
    parser.add_argument("--kv-unified", action="store_true", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--threads-batch", type=int, required=True)
    parser.add_argument("--batch-size", dest="batch", type=int, required=True)
    parser.add_argument("--ubatch-size", type=int, required=True)
    parser.add_argument("--cache-ram", dest="cache_mib", type=int, required=True)
    parser.add_argument("--chat-template", choices=["chatml"], required=True)
    parser.add_argument("--no-warmup", action="store_true", required=True)
    parser.add_argument("--n-gpu-layers", dest="layers_on_gpu", type=int)
    parser.add_argument("--lora", dest="adapter")
    runpy.run_path(str(PROCESS))["serve_with_wheel"](vars(parser.parse_args()))


if __name__ == "__main__":
    main()

"""The process that runs llama.cpp: a llama-server, or the server in the wheel `xllamacpp`.

    python -I llama_process.py '{"program": "/usr/bin/llama-server", "model": ...}'

It is a process of its own, so that its parent can report a crash of llama.cpp. The kernel kills it
when the parent ends. The key comes in LLAMA_API_KEY, which other users cannot read.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the parent ends; the setting survives `exec`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It has ended already.
        os._exit(1)


def arguments(options: dict[str, Any]) -> list[str]:
    """The command line of a llama-server."""
    found = [
        *("--model", options["model"]),
        *("--host", "127.0.0.1"),
        *("--port", "0"),
        *("--ctx-size", options["context"]),
        *("--parallel", options["slots"]),
        "--kv-unified",
        *("--threads", options["threads"]),
        *("--threads-batch", options["threads"]),
        *("--batch-size", options["batch"]),
        *("--ubatch-size", options["batch"]),
        *("--cache-ram", options["cache_mib"]),
        # Prompts come as tokens, and a template that llama.cpp cannot parse would end it.
        *("--chat-template", "chatml"),
        "--no-warmup",
    ]
    if options["layers_on_gpu"] is not None:
        found += ["--n-gpu-layers", options["layers_on_gpu"]]
    if options["adapter"] is not None:
        found += ["--lora", options["adapter"]]
    return list(map(str, found))


def serve_with_wheel(options: dict[str, Any]) -> None:
    """Runs the server of `xllamacpp` until this process is killed, or its input ends with the
    parent: not every kernel has `end_with_parent`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.port = 0
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_ctx = options["context"]
    params.n_parallel = options["slots"]
    params.kv_unified = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.n_batch = params.n_ubatch = options["batch"]
    params.cache_ram_mib = options["cache_mib"]
    params.chat_template = "chatml"
    params.warmup = False
    params.ui = False
    if options["layers_on_gpu"] is not None:
        params.n_gpu_layers = options["layers_on_gpu"]
    if options["adapter"] is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options["adapter"], 1.0)]
    server = xllamacpp.Server(params)
    print(f"server is listening on {server.listening_address}", flush=True)  # noqa: T201
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Becomes the llama-server, or serves in this process."""
    options = json.loads(sys.argv[1])
    end_with_parent(options["parent"])
    if options["program"] is None:
        serve_with_wheel(options)
    else:
        os.execv(options["program"], [options["program"], *arguments(options)])  # noqa: S606


if __name__ == "__main__":
    main()

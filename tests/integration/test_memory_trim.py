"""How much freed memory a process keeps, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SCRIPT = """
import ctypes, json, sys, tempfile, threading
from llm_sidecar.memory_trim import keep_little
keep_little()
import pyarrow
begin, end = threading.Barrier(9), threading.Barrier(9)
def allocate():
    begin.wait()
    blocks = [bytearray(1000) for _ in range(1000)]
    end.wait()
for _ in range(8):
    threading.Thread(target=allocate).start()
begin.wait()
end.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as found:
    file = ctypes.c_void_p(libc.fopen(found.name.encode(), b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    arenas = found.read().count(b"<heap ")
print(json.dumps([arenas, pyarrow.default_memory_pool().backend_name]))
"""


def kept(**environ: str) -> tuple[int, str]:
    """The number of arenas of a process with eight busy threads, and pyarrow's allocator."""
    command = [sys.executable, "-c", SCRIPT]
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    output = subprocess.run(command, env=clean | environ, capture_output=True, check=True).stdout
    arenas, pool = json.loads(output)
    return arenas, pool


def test_threads_share_two_arenas_and_arrow_has_no_memory_of_its_own() -> None:
    assert kept() == (2, "system")


def test_an_operator_can_choose_otherwise() -> None:
    assert kept(MALLOC_ARENA_MAX="3", ARROW_DEFAULT_MEMORY_POOL="mimalloc") == (3, "mimalloc")

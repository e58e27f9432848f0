from __future__ import annotations

import ctypes
import json
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_sidecar.memory_trim import release_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise as Linux has it")


def test_code_that_only_the_start_ran_is_let_go_and_all_runs_on() -> None:
    script = """
import json, re
from pathlib import Path
import pyarrow
from llm_sidecar.memory_trim import release_code

def from_files():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = from_files()
release_code()
after = from_files()
rows = pyarrow.table({"ticker": ["AAPL", "MSFT"]}).filter([False, True]).to_pylist()
print(json.dumps({"before": before, "after": after, "rows": rows}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(done.stdout)
    assert found["after"] < 0.7 * found["before"]
    assert found["rows"] == [{"ticker": "MSFT"}]


def test_code_that_is_not_as_in_its_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "code"
    file.write_bytes(b"\x90" * mmap.PAGESIZE)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped[:4] = b"here"
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    read_and_run = mmap.PROT_READ | mmap.PROT_EXEC
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, read_and_run) == 0
    assert re.search(rf"r-xp .*{file}$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    release_code()
    assert mapped[:4] == b"here"

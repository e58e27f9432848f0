"""How much memory is free, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_sidecar.free_memory import free_memory

KB = 1024


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 8,000 kB available, and no control groups yet."""
    meminfo = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    8000 kB\n"
    write(tmp_path / "proc", meminfo=meminfo)
    write(tmp_path / "proc" / "self", cgroup="")
    return tmp_path


def free(machine: Path) -> int | None:
    return free_memory(machine / "proc", machine / "groups")


def test_without_a_limit_all_that_the_machine_has_is_free(machine: Path) -> None:
    assert free(machine) == 8000 * KB


def test_it_is_unknown_without_the_kernel_s_files(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None


def test_the_limit_of_a_container_counts_less_the_files_that_can_be_read_again(
    machine: Path,
) -> None:
    write(machine / "proc" / "self", cgroup="0::/app/worker\n")
    group = {"memory__current": f"{3000 * KB}\n", "memory__stat": f"anon 5\ninactive_file {KB}\n"}
    write(machine / "groups" / "app" / "worker", memory__max=f"{5000 * KB}\n", **group)
    assert free(machine) == 2001 * KB


def test_the_strictest_limit_of_all_groups_above_counts(machine: Path) -> None:
    write(machine / "proc" / "self", cgroup="0::/app/worker\n")
    write(machine / "groups" / "app" / "worker", memory__max="max\n", memory__current="1\n")
    write(
        machine / "groups" / "app",
        memory__max=f"{900 * KB}\n",
        memory__current=f"{800 * KB}\n",
    )
    assert free(machine) == 100 * KB


def test_groups_of_the_first_version_count_too(machine: Path) -> None:
    # In a container the path is that of the machine, and the limit lies at the root.
    write(machine / "proc" / "self", cgroup="5:cpu:/x\n4:memory:/docker/1\n0::/\n")
    write(
        machine / "groups" / "memory",
        memory__limit_in_bytes=f"{700 * KB}\n",
        memory__usage_in_bytes=f"{500 * KB}\n",
    )
    assert free(machine) == 200 * KB


def test_above_its_limit_nothing_is_free(machine: Path) -> None:
    write(machine / "proc" / "self", cgroup="0::/\n")
    write(machine / "groups", memory__max="10\n", memory__current="20\n")
    assert free(machine) == 0

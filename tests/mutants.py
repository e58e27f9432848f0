"""Mutation tests of the modules with the decision logic: lists the mutants that survive.

    make mutants
    .venv/bin/python -m tests.mutants llm_sidecar.reward   # one module alone

mutmut makes small changes to the code (mutants), and runs the tests of `tests/unit` that reach a
mutant in a forked process. A mutant is killed when a test fails. A crash or a timeout proves
nothing about the tests, so it counts neither way. `docs/testing.md` has the reason for each
survivor.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from mutmut.mutation.diff_apply import get_diff_for_mutant

SCOPE: Final = (
    "llm_sidecar.db.filters.xǁFiltersǁnames*",
    "llm_sidecar.db.filters.xǁFiltersǁmisplaced*",
    "llm_sidecar.db.filters.xǁFiltersǁmatches*",
    "llm_sidecar.db.filters.x__*",
    "llm_sidecar.db.nested.*",
    "llm_sidecar.db.rows.*",
    "llm_sidecar.db.schema.*",
    "llm_sidecar.deadline.*",
    "llm_sidecar.grounding.*",
    "llm_sidecar.hermes_plugin.*",
    "llm_sidecar.input_model.*",
    "llm_sidecar.models.adapters.x_get_latest_adapter_dir*",
    "llm_sidecar.models.adapters.x_find_adapter_dir*",
    "llm_sidecar.models.adapters.x__adapters*",
    "llm_sidecar.models.adapters.x_holds_adapter*",
    "llm_sidecar.models.adapters.x_adapter_date*",
    "llm_sidecar.proposals.*",
    "llm_sidecar.reward.*",
    "llm_sidecar.settings.*",
    "llm_sidecar.services.adapters.*",
    "llm_sidecar.services.chat.*",
    "llm_sidecar.services.events.*",
    "llm_sidecar.services.example_rules.*",
    "llm_sidecar.services.feedback.*",
    "llm_sidecar.services.few_shot.*",
    "llm_sidecar.services.idempotency.*",
    "llm_sidecar.services.proposal_run.*",
    "llm_sidecar.services.propose.*",
    "llm_sidecar.services.refresh.*",
    "llm_sidecar.services.rows.*",
    "llm_sidecar.services.score.*",
    "llm_sidecar.text.*",
    "llm_sidecar.timestamps.*",
    "llm_sidecar.tts.answers.*",
    "llm_sidecar.tts.text.*",
    "llm_sidecar.tts.wav.*",
    "osiris.errors.x_row_of*",
    "osiris.idempotency.*",
    "osiris.llm_client.core.*",
    "osiris.llm_client.proxies.*",
    "osiris.llm_client.server_sent_events.*",
    "osiris.middleware.access.*",
    "osiris.middleware.admission.*",
    "osiris.paths.*",
    "osiris.routes.feedback.*",
)
"""mutmut's names of the functions in scope, in the modules of `tool.mutmut`."""
LEAST_SHARE: Final = 0.9
"""The least share of mutants that have to be killed, of those that were killed or survived."""

_ROOT: Final = Path(__file__).resolve().parent.parent
_MUTANTS: Final = _ROOT / "mutants"
_REASONS: Final = _ROOT / "docs" / "testing.md"
_KILLED: Final = 1
"""The exit status of pytest when a test has failed."""
_SURVIVED: Final = (0, 5, 33)
"""All tests passed; pytest collected no test; mutmut knows no test for the mutant."""


class Survivor(NamedTuple):
    """A change that no test notices, on one line."""

    function: str
    change: str

    def __str__(self) -> str:
        return f"`{self.function}`: {self.change}"


def results(scope: tuple[str, ...]) -> Iterator[tuple[str, int | None]]:
    """Each mutant's name, and the exit status of its tests."""
    for path in sorted(_MUTANTS.rglob("*.py.meta")):
        for name, status in json.loads(path.read_text())["exit_code_by_key"].items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in scope):
                yield name, status


def survivor(name: str) -> Survivor:
    """What a mutant changed."""
    module, _, mangled = name.rpartition(".")
    # x_split__mutmut_3, or xǁApiKeysǁ_knows__mutmut_3 for a method
    function = mangled.partition("__mutmut_")[0][1:].lstrip("ǁ").replace("ǁ", ".")
    function = function if "." in function else function.removeprefix("_")
    lines = [line for line in get_diff_for_mutant(name).splitlines()[2:] if line[0] in "+-"]
    gone = " ".join(line[1:].strip() for line in lines if line[0] == "-")
    come = " ".join(line[1:].strip() for line in lines if line[0] == "+")
    return Survivor(f"{module}.{function}", f"`{gone}` becomes `{come}`")


def main() -> int:
    """Runs mutmut and reports.

    Returns:
        0 if enough mutants are killed and each survivor has its reason; otherwise 1.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="only these, such as llm_sidecar.reward")
    parser.add_argument("--children", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--report", action="store_true", help="report on the last run only")
    options = parser.parse_args()
    scope = tuple(
        pattern
        for pattern in SCOPE
        if not options.modules or pattern.startswith(tuple(f"{m}." for m in options.modules))
    )
    os.chdir(_ROOT)
    if not options.report:
        # The results of an earlier run are out of date once a test has changed.
        shutil.rmtree(_MUTANTS, ignore_errors=True)
        mutmut = Path(sys.executable).parent / "mutmut"
        command = [str(mutmut), "run", "--max-children", str(options.children), *scope]
        if subprocess.run(command, check=False).returncode:
            return 1
    return report(scope)


def report(scope: tuple[str, ...]) -> int:
    """Prints the share of killed mutants of each module, the unknown results and the survivors."""
    killed: defaultdict[str, int] = defaultdict(int)
    survived: defaultdict[str, list[Survivor]] = defaultdict(list)
    unknown: list[tuple[str, int | None]] = []
    modules: set[str] = set()
    for name, status in results(scope):
        module = name.rpartition(".")[0]
        modules.add(module)
        if status == _KILLED:
            killed[module] += 1
        elif status in _SURVIVED:
            survived[module].append(survivor(name))
        else:
            unknown.append((name, status))
    for module in sorted(modules):
        print(_share(module, killed[module], len(survived[module])))
    survivors = [one for module in sorted(modules) for one in survived[module]]
    print(_share("all", sum(killed.values()), len(survivors)))
    print(f"\n{len(unknown)} unknown: a crash (a negative status is a signal) or a timeout")
    for name, status in unknown:
        print(f"  {name}: exit status {status}")
    reasons = _REASONS.read_text()
    unexplained = [one for one in survivors if str(one) not in reasons]
    for title, found in (
        (
            "survivors with a reason in docs/testing.md",
            [s for s in survivors if s not in unexplained],
        ),
        ("survivors without one", unexplained),
    ):
        print(f"\n{len(found)} {title}")
        for one in found:
            print(f"  {one}")
    total = sum(killed.values()) + len(survivors)
    return int(bool(unexplained) or not total or sum(killed.values()) / total < LEAST_SHARE)


def _share(name: str, killed: int, survived: int) -> str:
    total = killed + survived
    percent = f"{100 * killed / total:.1f} %" if total else "-"
    return f"{name:32} {killed:5} of {total:5} killed: {percent:>7}"


if __name__ == "__main__":
    sys.exit(main())

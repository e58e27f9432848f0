"""Project files: hooks, workflow, changelog, decisions, and the files that git ignores."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import llm_sidecar

ROOT = Path(__file__).resolve().parents[2]
ADR = ROOT / "docs" / "adr"
RECORDS = sorted(ADR.glob("[0-9]*.md"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ADR / "README.md", *RECORDS]


def recipe(target: str, *options: str) -> list[str]:
    """The commands that make would run for a target whose environment is set up."""
    make = ["make", "--no-print-directory", "--dry-run", *options, target]
    environ = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    done = subprocess.run(
        make, cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.splitlines()


def read_yaml(*path: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(ROOT.joinpath(*path).read_text())
    return found


# Linters and CI


def test_the_hooks_run_the_commands_of_make_lint_and_one_of_git() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert hooks.pop("whitespace")["entry"] == "git diff --cached --check"
    assert [hook["entry"] for hook in hooks.values()] == recipe("lint", "--old-file=.venv/.test")
    # Nothing is downloaded, and each checks the whole project, as `make lint` does.
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    assert not any(hook["pass_filenames"] for hook in local["hooks"])


def test_every_hook_runs_at_a_stage_that_is_installed() -> None:
    config = read_yaml(".pre-commit-config.yaml")
    (local,) = config["repos"]
    stages = [hook.get("stages", config["default_stages"]) for hook in local["hooks"]]
    assert stages == [["pre-commit"]] * 3 + [["pre-push"]] * 2
    assert config["default_install_hook_types"] == ["pre-commit", "pre-push"]


def test_the_workflow_checks_out_and_calls_ci_run() -> None:
    (job,) = read_yaml(".github", "workflows", "ci.yml")["jobs"].values()
    checkout, run = job["steps"]
    assert re.fullmatch(r"actions/checkout@v\d+\.\d+\.\d+", checkout["uses"])
    assert checkout["with"] == {"persist-credentials": False}
    assert run == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert job["timeout-minutes"] == 60


def test_the_workflow_has_the_python_of_the_image() -> None:
    (job,) = read_yaml(".github", "workflows", "ci.yml")["jobs"].values()
    image = re.search(r"^ARG PYTHON_IMAGE=(\S+)-slim-", (ROOT / "Dockerfile").read_text(), re.M)
    assert image is not None
    assert job["container"].partition("-")[0] == image[1]


def test_the_workflow_may_only_read_and_an_older_run_of_a_branch_ends() -> None:
    workflow = read_yaml(".github", "workflows", "ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"] == {
        "group": "ci-${{ github.ref }}",
        "cancel-in-progress": True,
    }
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True] == {
        "push": {"branches": ["main"]},
        "pull_request": None,
        "workflow_dispatch": None,
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An empty repository that ignores what this one does."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    return tmp_path


def ignored(repository: Path, *paths: str) -> list[str]:
    """Those of the paths that git ignores; one that ends in a slash is a folder."""
    for path in paths:
        if path.endswith("/"):
            (repository / path).mkdir(parents=True, exist_ok=True)
    command = ["git", "-c", "core.excludesFile=", "check-ignore", *paths]
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.splitlines()


def test_git_ignores_all_that_make_clean_removes(repository: Path) -> None:
    removed = [
        path.replace("*", "x")
        for command in recipe("clean")
        if command.startswith("rm ")
        for path in command.split()[2:]
    ]
    assert ".venv" in removed
    assert "mutants" in removed
    paths = [path if path.startswith(".coverage") else f"{path}/" for path in removed]
    assert ignored(repository, *paths) == paths


def test_git_ignores_secrets_and_weights_but_no_source(repository: Path) -> None:
    assert ignored(repository, ".env", "models/phi3/x.onnx") == [".env", "models/phi3/x.onnx"]
    assert ignored(repository, "llm_sidecar/demo/phi3/model.onnx", "tests/models/x.py") == []


# Changelog


def test_the_changelog_has_the_version_and_is_in_order() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *rest = re.findall(r"^## \[(.+?)\](?: - (.+))?$", text, re.M)
    assert len(re.findall(r"^## ", text, re.M)) == len(rest) + 1
    assert first == ("Unreleased", "")
    dated = [(version, datetime.date.fromisoformat(date)) for version, date in rest]
    numbers = [tuple(map(int, version.split("."))) for version, _ in dated]
    assert all(newer > older for newer, older in pairwise(numbers))
    assert all(newer[1] >= older[1] for newer, older in pairwise(dated))
    # A version that is not released yet is announced.
    assert f"\nThe next release is {llm_sidecar.__version__}.\n" in text or (
        rest[0][0] == llm_sidecar.__version__
    )


def test_the_changelog_uses_the_headings_of_keep_a_changelog() -> None:
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# Decisions and pages


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_a_decision_has_its_parts_and_a_row_in_the_index(record: Path) -> None:
    lines = record.read_text().splitlines()
    number = int(record.name.partition("-")[0])
    title = lines[0].removeprefix("# ")
    assert title.startswith(f"{number}. ")
    status = re.fullmatch(r"Status: (accepted|superseded by .+) · (\d{4}-\d\d-\d\d)", lines[2])
    assert status is not None
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## Context", "## Decision", "## Consequences"]
    row = f"| [{title}]({record.name}) | {status[2]} | {status[1]} |"
    assert row in (ADR / "README.md").read_text().splitlines()


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(record.name[:4]) for record in RECORDS] == list(range(1, len(RECORDS) + 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_and_paths_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https://)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(
        r"`((?:llm_sidecar|osiris|training|tests|docs|benchmarks|deploy|\.ci)/[^`*]*)`", text
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_make_targets_of_the_pages_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", text, re.M))
    assert {one or other for one, other in named} <= known

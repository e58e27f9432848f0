"""What the package installs: requirements, extras, files, commands."""

from __future__ import annotations

import ast
import email
import functools
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llm_sidecar
from osiris import console_scripts

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NAME = PROJECT["name"]


def ranges(extra: str | None) -> dict[str, Requirement]:
    """The requirements of the bare package or of an extra, including the extras inside it."""
    found: dict[str, Requirement] = {}
    for text in PROJECT["dependencies"] if extra is None else EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == NAME:
            for included in requirement.extras:
                found |= ranges(included)
        else:
            found[requirement.name] = requirement
    return found


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if "==" in line and not line.startswith("#")]
    return {one.name: str(one.specifier).removeprefix("==") for one in pinned}


FILES = ("requirements.txt", "requirements-gguf.txt", "requirements-ray.txt")
PINS = {name: pin for file in FILES for name, pin in pins(file).items()}


def test_the_bare_package_needs_httpx_and_pydantic_only() -> None:
    assert set(ranges(None)) == {"httpx", "pydantic"}
    assert ranges("client") == {}


def test_the_package_and_its_extras_need_what_is_pinned_and_nothing_else() -> None:
    needed = set(ranges(None)).union(*map(ranges, EXTRAS))
    assert needed == set(PINS)
    assert {*ranges(None), *ranges("all"), *ranges("ray")} == needed


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_each_range_has_an_end_and_the_version_that_is_tested(extra: str | None) -> None:
    for name, requirement in ranges(extra).items():
        assert requirement.specifier.contains(PINS[name], prereleases=True), requirement
        assert {each.operator for each in requirement.specifier} == {">=", "<"}, requirement


def test_the_chatterbox_environment_fits_the_ranges_of_speech() -> None:
    chatterbox = pins("requirements-chatterbox.txt")
    speech = ranges("speech") | ranges(None)
    shared = speech.keys() & chatterbox.keys()
    assert {"redis", "hiredis", "pydantic", "pydantic-settings"} <= shared
    for name in shared:
        assert speech[name].specifier.contains(chatterbox[name]), speech[name]


# A module and the extras that bring what it imports.
DOORS = {
    "osiris.llm_client": None,
    "osiris.console_scripts": None,
    "llm_sidecar.errors": None,
    "llm_sidecar.settings": "speech",
    "osiris.__main__": "server",
    "osiris.server": "server",
    "osiris.ray_serve.__main__": "server",
    "llm_sidecar.proposals": "server",
    "llm_sidecar.reward": "server",
    "llm_sidecar.db.__main__": "server",
    "llm_sidecar.event_bus": "server",
    "llm_sidecar.loader": "server",
    "llm_sidecar.tts": "speech",
    "llm_sidecar.tts.__main__": "speech",
    "llm_sidecar.tts.piper_worker": "piper",
    "llm_sidecar.engines.onnx": "onnx",
    "llm_sidecar.engines.ort": "onnx",
    "llm_sidecar.engines.ort_model": "onnx",
    "llm_sidecar.engines.lora_graph": "onnx",
    "llm_sidecar.engines.torch": "torch",
    "llm_sidecar.engines.torch_states": "torch",
    "llm_sidecar.telemetry.traces": "server otel",
    "llm_sidecar.telemetry.sentry": "server sentry",
    "llm_sidecar.telemetry.profiling": "server profiling",
}
# What a package that is named brings, and always will.
BROUGHT = {
    "anyio": "httpx",
    "click": "uvicorn",
    "h11": "uvicorn",
    "pydantic-core": "pydantic",
    "safetensors": "transformers",
}
PACKAGES = functools.cache(importlib.metadata.packages_distributions)
"""Top-level module → the distributions that have it."""


@pytest.mark.parametrize("module", DOORS)
def test_a_module_imports_only_what_its_extra_brings(module: str) -> None:
    assert source(module)
    check_extras(module, (DOORS[module] or "").split())


@pytest.mark.parametrize("command", ["serve", "database", "loader", "speech"])
def test_a_command_names_the_extras_that_it_needs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = []

    def missing(module: str) -> None:
        modules.append(module)
        raise ModuleNotFoundError(name="one")

    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", missing)
        assert getattr(console_scripts, command)() == 1
    named = re.fullmatch(
        r"The package one is not installed\. Install what this command needs:"
        r" pip install 'osiris-llm-sidecar\[([a-z,]+)\]'\n",
        capsys.readouterr().err,
    )
    assert named
    check_extras(modules[0], named[1].split(","))


def check_extras(module: str, extras: list[str]) -> None:
    """Whether the extras bring all that importing a module imports."""
    allowed = {*ranges(None), *(name for extra in extras for name in ranges(extra))}
    for top in third_party(module):
        distributions: set[str] = {canonicalize_name(name) for name in PACKAGES()[top]}
        distributions |= {BROUGHT[name] for name in distributions & BROUGHT.keys()}
        assert distributions & allowed, top


def third_party(door: str) -> set[str]:
    """The top-level modules that importing a module imports, without the standard library's."""
    found = set()
    seen = set()
    waiting = [door]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        top, _, _ = name.partition(".")
        if top in ("llm_sidecar", "osiris"):
            if file := source(name):
                waiting += imports(file)
                waiting.append(name.rpartition(".")[0] or name)
        elif top not in sys.stdlib_module_names:
            found.add(top)
    return found


def source(module: str) -> Path | None:
    """The file of one of our modules; None if the name is an attribute of a module."""
    path = ROOT.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.exists()), None)


def imports(file: Path) -> Iterator[str]:
    for node in executed(ast.parse(file.read_text()).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


NOT_ON_IMPORT = ("TYPE_CHECKING", "__name__ == '__main__'")


def executed(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in statements:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in NOT_ON_IMPORT:
            yield from executed(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from executed(getattr(node, part, []))


def test_importing_the_client_imports_nothing_of_the_server() -> None:
    code = """
import sys
before = set(sys.modules)
import osiris.llm_client
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split()) - sys.stdlib_module_names
    ours = {name for name in loaded if name in ("osiris", "llm_sidecar")}
    assert ours == {"osiris"}
    distributions = {canonicalize_name(name) for top in loaded - ours for name in PACKAGES()[top]}
    # httpx imports what its own command line needs, where that is installed.
    assert distributions <= closure("httpx") | closure("click") | closure("rich")


def test_the_client_brings_no_model_runtime_and_no_database() -> None:
    brought = closure("httpx") | closure("pydantic")
    assert brought & {"torch", "lancedb", "onnxruntime", "fastapi", "redis", "numpy"} == set()
    assert len(brought) < 15


def closure(name: str) -> set[str]:
    """A distribution and what it needs, without extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = canonicalize_name(waiting.pop())
        if current not in found:
            found.add(current)
            needed = map(Requirement, importlib.metadata.requires(current) or [])
            for requirement in needed:
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel that is made of a source distribution, which is made of what git has."""
    folder = tmp_path_factory.mktemp("package")
    copy_package(folder / "tree")
    build(folder / "tree", folder, "sdist")
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    build(folder / archive.name.removesuffix(".tar.gz"), folder, "wheel")
    [file] = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def copy_package(to: Path) -> None:
    """A copy of the package's sources, so that builds leave no files in this repository."""
    for name in tracked("pyproject.toml", "README.md", "llm_sidecar", "osiris"):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)


def build(tree: Path, out: Path, kind: str) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def tracked(*paths: str) -> set[str]:
    """The files that git has or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in run.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == tracked("llm_sidecar", "osiris")
    assert {"llm_sidecar/py.typed", "osiris/py.typed"} <= files


def test_of_the_demo_models_the_wheel_holds_weights_card_and_evaluation_but_no_recipe(
    wheel: zipfile.ZipFile,
) -> None:
    files = {Path(name) for name in wheel.namelist()}
    demo = {path.relative_to("llm_sidecar/demo") for path in files if "demo" in path.parts}
    assert {str(path) for path in demo if len(path.parts) == 1} == {
        "MODEL_CARD.md",
        "__init__.py",
        "__main__.py",
        "corrections.jsonl",
        "evaluate.py",
        "handwritten.jsonl",
        "held_out_proposals.jsonl",
        "held_out_scores.jsonl",
    }
    assert {path.parts[0] for path in demo if len(path.parts) > 1} == {"phi3", "hermes"}
    tops = {path.parts[0] for path in files if not path.parts[0].endswith(".dist-info")}
    assert tops == {"llm_sidecar", "osiris"}


def test_the_package_imports_nothing_of_the_training() -> None:
    sources = [*ROOT.glob("llm_sidecar/**/*.py"), *ROOT.glob("osiris/**/*.py")]
    imported = {name.partition(".")[0] for file in sources for name in imports(file)}
    assert "training" not in imported


def test_the_wheel_says_what_pyproject_says(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == NAME
    assert metadata["Version"] == llm_sidecar.__version__
    assert set(metadata.get_all("Provides-Extra") or ()) == set(EXTRAS)


SCRIPTS: dict[str, str] = PROJECT["scripts"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_prints_its_help(script: str) -> None:
    run = command(script, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert "usage: " in run.stdout.lower()


@pytest.mark.parametrize(
    ("script", "missing", "extra"),
    [
        ("osiris-sidecar", "uvicorn", "server"),
        ("osiris-sidecar-db", "pydantic", "server"),
        ("osiris-sidecar-loader", "pydantic", "server,onnx,torch"),
        ("osiris-sidecar-speech", "redis", "speech"),
    ],
)
def test_a_command_says_which_extra_it_needs(script: str, missing: str, extra: str) -> None:
    run = command(script, "--help", missing=missing)
    assert (run.returncode, run.stdout) == (1, "")
    [line] = run.stderr.splitlines()
    named = re.fullmatch(
        r"The package (\w+)(?:\.\w+)* is not installed. Install what this command needs:"
        r" pip install 'osiris-llm-sidecar\[([\w,]+)\]'",
        line,
    )
    assert named
    assert named.groups() == (missing, extra)


def command(
    script: str, *arguments: str, missing: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command as its script does, as if a package were not there."""
    module, _, function = SCRIPTS[script].partition(":")
    code = f"""
import sys
if {missing!r}: sys.modules[{missing!r}] = None
from {module} import {function}
sys.argv = {[script, *arguments]!r}
sys.exit({function}())
"""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

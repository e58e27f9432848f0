"""Only the settings read the environment; every other use is listed here with its reason."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "llm_sidecar" / "settings"

CHILD = "a child process inherits the environment"
CLIENT = "the client is installed without the settings and has variables of its own"
ALLOWED = {
    ("llm_sidecar/command_line.py", "os.environ.get('TERM')"): "describes the terminal",
    ("llm_sidecar/engines/llama_process.py", "os.environ['LLAMA_API_KEY']"): "its parent's key",
    ("llm_sidecar/engines/llama_server.py", "**os.environ"): CHILD,
    ("llm_sidecar/memory_trim.py", "os.environ.get('MALLOC_ARENA_MAX')"): "glibc's own variable",
    ("llm_sidecar/models/conversion/child.py", "**os.environ"): CHILD,
    ("llm_sidecar/models/local/process.py", "**os.environ"): CHILD,
    ("llm_sidecar/models/local/process.py", "os.environ.get('PYTHONPATH')"): CHILD,
    ("llm_sidecar/tts/piper_process.py", "**os.environ"): CHILD,
    ("llm_sidecar/tts/piper_process.py", "os.environ.get('PYTHONPATH')"): CHILD,
    ("osiris/__main__.py", "os.environ.get('WEB_CONCURRENCY')"): "uvicorn's own variable",
    ("osiris/llm_client/core.py", "os.environ.get('OSIRIS_SIDECAR_URL')"): CLIENT,
    ("osiris/llm_client/core.py", "os.environ.get('SIDECAR_API_KEY')"): CLIENT,
    ("osiris/llm_client/proxies.py", "os.environ.items()"): CLIENT,
    ("osiris/ray_serve/launch.py", "os.environ.pop(name, None)"): CHILD,
    ("osiris/ray_serve/launch.py", "os.environ.get('PYTHONPATH')"): CHILD,
    ("osiris/ray_serve/replica.py", "**os.environ"): "the settings of a replica preload its model",
}
"""A file, how it reads the environment, and why it may."""
NAMES = {"environ", "environb", "getenv", "getenvb"}
WRITES = {"update", "setdefault"}


class Reads(ast.NodeVisitor):
    """Collects the expressions that read the environment.

    Setting a variable for a library is not a read: an assignment, `update`, or a `setdefault` whose
    result is not used.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "os" and NAMES & {alias.name for alias in node.names}:
            self.found.append(ast.unparse(node))

    def visit_Expr(self, node: ast.Expr) -> None:
        match node.value:
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if (
                is_environment(value) and name in WRITES
            ):
                for argument in [*node.value.args, *node.value.keywords]:
                    self.visit(argument)
            case _:
                self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if is_environment(node.value) and isinstance(node.ctx, ast.Load):
            self.found.append(ast.unparse(node))
        elif not is_environment(node.value):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Attribute(value=value) if is_environment(value) or is_environment(node.func):
                self.found.append(ast.unparse(node))
            case _:
                self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None and is_environment(value):
                self.found.append(f"**{ast.unparse(value)}")
            else:
                self.visit(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_environment(node):
            self.found.append(ast.unparse(node))
        else:
            self.generic_visit(node)


def is_environment(node: ast.expr) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="os"), attr=name):
            return name in NAMES
    return False


def reads(code: str) -> list[str]:
    visitor = Reads()
    visitor.visit(ast.parse(code))
    return visitor.found


def test_only_the_settings_read_the_environment() -> None:
    found = {
        (str(file.relative_to(ROOT)), read)
        for package in ("llm_sidecar", "osiris")
        for file in (ROOT / package).rglob("*.py")
        if not file.is_relative_to(SETTINGS)
        for read in reads(file.read_text())
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os\nx = os.environ['A']", ["os.environ['A']"]),
        ("import os\nf(os.environ.get('A') or 1)", ["os.environ.get('A')"]),
        ("import os\nx = os.getenv('A')", ["os.getenv('A')"]),
        ("import os\nx = os.environ.setdefault('A', '1')", ["os.environ.setdefault('A', '1')"]),
        (
            "import os\nx = {**os.environ, 'A': os.environ['B']}",
            ["**os.environ", "os.environ['B']"],
        ),
        ("import os\ndef f(e=os.environ): 'A' in os.environ", ["os.environ", "os.environ"]),
        ("from os import environ as e", ["from os import environ as e"]),
        ("import os\nos.environ['A'] = os.environ['B']", ["os.environ['B']"]),
        ("import os\nos.environ.update(A=os.environ['B'])", ["os.environ['B']"]),
        ("import os\nos.environ.setdefault('A', '1')\nos.environ['A'] = '1'", []),
    ],
)
def test_a_read_is_told_from_a_write(code: str, expected: list[str]) -> None:
    assert sorted(reads(code)) == sorted(expected)


@pytest.mark.parametrize("module", ["llm_sidecar.errors", "llm_sidecar.logs", "osiris.llm_client"])
def test_the_client_and_the_lowest_modules_do_not_import_pydantic_settings(module: str) -> None:
    code = f"import sys, {module}; sys.exit('pydantic_settings' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

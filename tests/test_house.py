"""The package's structure: arrows between packages, circles between modules, lengths of files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "fedsq_plugin"
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
MAX_FILE, MAX_FUNCTION = 350, 60


def name_of(path: Path) -> str:
    return ".".join(path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts)


MODULES = {name_of(path): path for path in TREES}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, except what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from nodes(child)


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports, at its beginning or within a function."""
    path = MODULES[module]
    package = path.parent.parts
    found: set[str] = set()
    for node in nodes(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *([node.module] if node.module else [])))
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {source}
    return (found & MODULES.keys()) - {module}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules that are left when all without an open import are taken away, again and again."""
    left = {module: set(targets) for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    graph = {module: imported(module) for module in MODULES}
    assert graph[f"{PACKAGE}.wire.message"] >= {f"{PACKAGE}.wire.tensors", f"{PACKAGE}.errors"}
    assert circle(graph) == []


def test_no_file_is_too_long() -> None:
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in TREES}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


def test_the_contracts_of_the_imports_hold() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run([sys.executable, "-c", command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout

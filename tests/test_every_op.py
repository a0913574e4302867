"""Every op has a twin beside it, a test and a benchmark by its name.

An op is a public function that reaches the native core or the kernels of Triton: in `ops` and its tiles, and wherever
else the core is called.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dreamfusion_fast"
OPS = "dreamfusion_fast.ops"
# Where a call leaves Python: the door to the native core, and the launches of the MLP's kernels.
DOORS = (f"{OPS}._native.call", f"{OPS}._mlp_launch.prepare_forward", f"{OPS}._mlp_launch.prepare_backward")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def references() -> dict[str, set[str]]:
    """By the full name of each function of the package, the full names that its body has, and those of its autograd."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module, tree = module_name(path), ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

        def used(node: ast.AST, names: dict[str, str] = names) -> set[str]:
            within = list(ast.walk(node))
            simple = {names[part.id] for part in within if isinstance(part, ast.Name) and part.id in names}
            dotted = [part for part in within if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)]
            return simple | {f"{names[part.value.id]}.{part.attr}" for part in dotted if part.value.id in names}

        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(f"{module}.{node.name}", set()).update(used(node))
            elif isinstance(node, ast.Expr) and "register_autograd" in ast.unparse(node):
                op = node.value.func.value.id  # type: ignore[attr-defined]
                found.setdefault(f"{module}.{op}", set()).update(used(node))
    return found


def reached(function: str) -> set[str]:
    """All that a function calls, and what that calls."""
    seen, ahead = {function}, [function]
    while ahead:
        new = references().get(ahead.pop(), set()) - seen
        seen |= new
        ahead += new
    return seen


def native_calls() -> dict[str, set[str]]:
    """The names of the native functions, by the full name of the function that calls them."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("call", "_native.call"):
                    assert isinstance(function, ast.FunctionDef), f"{path}: call at the level of a module or class"
                    name = ast.literal_eval(node.args[0])
                    found.setdefault(f"{module_name(path)}.{function.name}", set()).add(name)
    return found


def ops() -> list[str]:
    """Full names, sorted."""
    calling = {function.rpartition(".")[0] for function in native_calls()}
    found = []
    for function in references():
        module, _, name = function.rpartition(".")
        ours = module in calling or module.startswith(f"{OPS}.")
        public = not name.startswith("_") and not module.rpartition(".")[2].startswith("_")
        if ours and public and not name.endswith("_reference") and reached(function) & set(DOORS):
            found.append(function)
    return sorted(found)


@cache
def names_tested_for(module: str) -> set[str]:
    """The names in the code of the test files that are named like a module."""
    *folders, file = module.split(".")[1:]
    found = set()
    for path in (ROOT / "tests").joinpath(*folders).glob(f"*{file}*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found |= {getattr(node, name, None) for name in ("id", "attr", "name")}
    return found


@cache
def benchmarks() -> set[str]:
    """The words by which `-k` tells the benchmarks of ops apart: of each, its name and its parameters."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_ops.py"), "--collect-only", "-q", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    names = re.findall(r"::test_(\w+)(?:\[(.*)\])?$", run.stdout, flags=re.M)
    return {word for name, parameters in names for word in (name, *parameters.split("-"))}


@pytest.mark.parametrize("op", ops())
def test_it_has_a_twin_a_test_and_a_benchmark(op: str) -> None:
    module, _, name = op.rpartition(".")
    assert callable(getattr(importlib.import_module(module), f"{name}_reference", None)), f"{op} has no twin"
    assert name in names_tested_for(module), f"no test of {module} has {name}"
    assert name in benchmarks(), f"bench_ops.py has no benchmark of {name}"


def test_no_native_function_is_called_but_by_an_op() -> None:
    by_an_op = {function for op in ops() for function in reached(op)}
    assert {function: names for function, names in native_calls().items() if function not in by_an_op} == {}


def test_ops_are_found() -> None:
    """Through autograd, an import, a partial application: some that would be lost first."""
    assert {"ops.mlp.mlp", "ops.march.march_lattice", "ops.tiles.mlp.prepared_backward", "networks.dense.linear"} <= {
        op.removeprefix("dreamfusion_fast.") for op in ops()
    }
    assert f"{OPS}.hash_grid._backward_backward" in reached(f"{OPS}.hash_grid.hash_grid")
    assert len({name for names in native_calls().values() for name in names}) > 20

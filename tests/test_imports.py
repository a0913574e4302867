"""Imports point down only: each part may use those above it in this list, whatever the place of the import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dreamfusion_fast"

# From the ground up. A module belongs to the longest entry that its name begins with.
ORDER = (
    "driver",
    "errors",
    "signals",
    "streams",
    "settings",
    "io",
    "ops",
    "gpu",
    "fields",
    "rendering",
    "integrations",
    "scene",
    "networks",
    "export",
    "guidance.prompts",
    "guidance.memory",
    "guidance.models.schedule",
    "guidance.contract",
    "guidance.methods",
    "guidance.config",
    "guidance.cache",
    "guidance.models",
    "guidance.distillation",
    "guidance.creation",
    "guidance",
    "training.device",
    "training.opaque",
    "training.losses",
    "training.struts",
    "training.config_io",
    "training.amortised",
    "training.sections",
    "training.presets",
    "training.memory_plan",
    "training.config",
    "training",
    "validation",
    "batch",
    "view",
    "app.guard",
    "app.runs",
    "app.jobs",
    "app.request",
    "app.words",
    "app.page",
    "app.serve",
    "app",
    "doctor",
    "cli",
)


def place(module: str) -> int:
    """Index into `ORDER` of a module's name without the package's."""
    fitting = [entry for entry in ORDER if f"{module}.".startswith(f"{entry}.")]
    assert fitting, f"{module} has no place in ORDER"
    return ORDER.index(max(fitting, key=len))


def modules() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name]


def imported(module: str) -> Iterator[tuple[int, str]]:
    """Line and name, without the package's, of all that a module imports from the package, anywhere in it."""
    path = PACKAGE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    package = f"dreamfusion_fast.{module}".split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            base = (base + (node.module or "")).rstrip(".")
            # `from package import module` names a module, too.
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("dreamfusion_fast."):
                yield node.lineno, name.removeprefix("dreamfusion_fast.")


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    # A package's own __init__ gathers what is in it.
    own = place(module)
    up = [
        f"line {line}: {name}"
        for line, name in imported(module)
        if name not in ("__version__",) and place(name) > own and not name.startswith("_core")
    ]
    assert up == []


def test_the_order_names_what_there_is() -> None:
    names = modules()
    assert [entry for entry in ORDER if not any(f"{name}.".startswith(f"{entry}.") for name in names)] == []


def test_an_upward_import_would_be_found() -> None:
    assert (
        place("ops.march") < place("rendering.volume.renderer") < place("guidance.creation") < place("training.trainer")
    )
    assert place("guidance.models.schedule") < place("guidance.contract") < place("guidance.models.embedded.guide")

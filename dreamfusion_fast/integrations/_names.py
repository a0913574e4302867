"""How drop-ins answer to names: to those of other packages, and to their own when these are first used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def deferred(module: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module whose names are imported when they are first used.

    Ops register themselves with torch, which takes several times as long as all else that a drop-in imports.

    Args:
        module: its full name.
        names: the module, by its full name, that has each of the names.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(names[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[module]), *names})

    return get, names_of


def present(name: str) -> bool:
    """Whether `import name` finds a module: one that is loaded, or a file. A folder without code is none."""
    if name in sys.modules:
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def stand_in(name: str, package: str, modules: Mapping[str, str], force: bool) -> bool:
    """Make a name, and names below it, find a package of ours for the rest of the process.

    Args:
        name: of the other package.
        package: ours, which is loaded.
        modules: our module for each name below, both by their full names.
        force: also where there is something of that name. Modules that have names of it keep those.

    Returns:
        Whether the name finds ours.
    """
    if not force and present(name):
        return sys.modules.get(name) is sys.modules[package]
    found = {below: importlib.import_module(module) for below, module in modules.items()}
    for old in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[old]
    sys.modules.update({name: sys.modules[package], **found})
    return True

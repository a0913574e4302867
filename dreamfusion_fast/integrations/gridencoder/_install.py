"""Answering to the names of gridencoder and of its compiled module."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from dreamfusion_fast.integrations.gridencoder import compiled
from dreamfusion_fast.integrations.gridencoder.geometry import check_geometry

_PACKAGE = "dreamfusion_fast.integrations.gridencoder"
_NAMES = {
    "_gridencoder": f"{_PACKAGE}.compiled",
    "gridencoder": _PACKAGE,
    "gridencoder.grid": f"{_PACKAGE}.grid",
}


def install(force: bool = False, geometry: str = "stable-dreamfusion") -> bool:
    """Makes ``import _gridencoder`` and ``import gridencoder`` find this package for the rest of the process.

    Args:
        force: also where there is something of that name, such as a project's own folder ``gridencoder``. Modules that
            have names of it keep those.
        geometry: of the grids that ``_gridencoder`` is asked for, ``"stable-dreamfusion"`` or ``"torch-ngp"``. Calls
            without max_level, which only the latter kind makes, are told by that.

    Returns:
        Whether ``_gridencoder`` is this package's now.

    Raises:
        ValueError: another geometry.
    """
    check_geometry("install", geometry)
    compiled.geometry = geometry
    for name, module in _NAMES.items():
        if force or not _present(name):
            sys.modules[name] = importlib.import_module(module)
    return sys.modules.get("_gridencoder") is compiled


def _present(name: str) -> bool:
    """Whether there is something of that name."""
    parent = name.rpartition(".")[0]
    if parent:  # to look for it would import the project's package
        return sys.modules.get(parent) is not sys.modules[_PACKAGE]
    return name in sys.modules or importlib.util.find_spec(name) is not None

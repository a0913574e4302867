"""Answering to the names of gridencoder and of its compiled module."""

from __future__ import annotations

import importlib
import sys

from dreamfusion_fast.integrations._names import present

_PACKAGE = "dreamfusion_fast.integrations.gridencoder"
_NAMES = {
    "_gridencoder": f"{_PACKAGE}.backend",
    "gridencoder": _PACKAGE,
    "gridencoder.grid": f"{_PACKAGE}.grid",
}


def install(force: bool = False, flavour: str = "stable-dreamfusion") -> list[str]:
    """Makes ``import _gridencoder`` and ``import gridencoder`` find this package for the rest of the process.

    Args:
        force: also where there is something of that name, such as a project's own folder ``gridencoder``. Modules that
            have names of it keep those.
        flavour: of `GridEncoder` and of the grids that ``_gridencoder`` is asked for from now on,
            ``"stable-dreamfusion"`` or ``"torch-ngp"``. Calls of the latter without max_level are told by that.

    Returns:
        The names that now stand for modules of this package.

    Raises:
        ValueError: another flavour.
    """
    # Here, since the ops behind them take longer to import than a project should wait that has its own.
    from dreamfusion_fast.integrations.gridencoder import backend
    from dreamfusion_fast.integrations.gridencoder.geometry import check_flavour

    check_flavour("install", flavour)
    backend.flavour = flavour
    for name, module in _NAMES.items():
        if force or not _present(name):
            sys.modules[name] = importlib.import_module(module)
    return [name for name, module in _NAMES.items() if sys.modules.get(name) is sys.modules.get(module)]


def _present(name: str) -> bool:
    """Whether there is something of that name."""
    parent = name.rpartition(".")[0]
    if parent:  # to look for it would import the project's package
        return sys.modules.get(parent) is not sys.modules[_PACKAGE]
    return present(name)

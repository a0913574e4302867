"""Modules under the names that other projects import."""

from __future__ import annotations

import importlib
import sys

from dreamfusion_fast.integrations._names import present

_PACKAGE = "dreamfusion_fast.integrations.raymarching"
_FLAVOURS = {"stable-dreamfusion": _PACKAGE, "torch-ngp": f"{_PACKAGE}.torch_ngp"}


def install(force: bool = False, flavour: str = "stable-dreamfusion") -> list[str]:
    """Make `import raymarching` and `import _raymarching` find the functions of this package.

    `_raymarching` is the compiled module that the projects' own `raymarching` packages import first; it serves both
    flavours. A name that can be imported already is left alone.

    Args:
        force: take both names whatever they stand for now. Import what is to use them afterwards.
        flavour: whose `raymarching` it is, "stable-dreamfusion" or "torch-ngp".

    Returns:
        The names that now stand for modules of this package.

    Raises:
        ValueError: another flavour.
    """
    if flavour not in _FLAVOURS:
        raise ValueError(f"install: flavour must be {' or '.join(_FLAVOURS)}, got {flavour!r}")
    installed = []
    for name, target in (("raymarching", _FLAVOURS[flavour]), ("_raymarching", f"{_PACKAGE}.backend")):
        loaded = sys.modules.get(name)
        ours = loaded is not None and loaded.__name__.startswith(_PACKAGE)
        if force or ours or not present(name):
            sys.modules[name] = importlib.import_module(target)
            installed.append(name)
    return installed

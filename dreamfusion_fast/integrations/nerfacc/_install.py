"""Answering to the name of nerfacc."""

from __future__ import annotations

import importlib
import importlib.util
import sys

_PACKAGE = "dreamfusion_fast.integrations.nerfacc"
_MODULES = (
    "",
    ".data_specs",
    ".estimators",
    ".estimators.base",
    ".estimators.occ_grid",
    ".estimators.prop_net",
    ".grid",
    ".losses",
    ".pack",
    ".pdf",
    ".scan",
    ".version",
    ".volrend",
)


def install(force: bool = False) -> bool:
    """Makes ``import nerfacc``, and of its modules, find this package for the rest of the process.

    Args:
        force: also where nerfacc is installed, or imported already. Modules that have names of it keep those.

    Returns:
        Whether it does so: not where nerfacc is installed and `force` is False.
    """
    if not force and _present():
        return sys.modules.get("nerfacc") is sys.modules[_PACKAGE]
    modules = {f"nerfacc{name}": importlib.import_module(f"{_PACKAGE}{name}") for name in _MODULES}
    for name in [name for name in sys.modules if name == "nerfacc" or name.startswith("nerfacc.")]:
        del sys.modules[name]
    sys.modules.update(modules)
    return True


def _present() -> bool:
    """Whether there is something of that name."""
    if "nerfacc" in sys.modules:
        return True
    return importlib.util.find_spec("nerfacc") is not None

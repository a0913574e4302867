"""Answering to the name of nerfacc."""

from __future__ import annotations

from dreamfusion_fast.integrations._names import stand_in

_PACKAGE = "dreamfusion_fast.integrations.nerfacc"
_MODULES = (
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
    modules = {f"nerfacc{name}": f"{_PACKAGE}{name}" for name in _MODULES}
    return stand_in("nerfacc", _PACKAGE, modules, force)

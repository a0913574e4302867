"""Answering to the name of tiny-cuda-nn."""

from __future__ import annotations

from dreamfusion_fast.integrations._names import stand_in

_PACKAGE = "dreamfusion_fast.integrations.tinycudann"


def install(force: bool = False) -> bool:
    """Makes ``import tinycudann`` find this package for the rest of the process.

    Args:
        force: also where tiny-cuda-nn is installed, or imported already. Modules that have names of it keep those.

    Returns:
        Whether it does so: not where tiny-cuda-nn is installed and `force` is False.
    """
    return stand_in("tinycudann", _PACKAGE, {"tinycudann.modules": f"{_PACKAGE}.modules"}, force)

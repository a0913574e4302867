"""Answering to the name of tiny-cuda-nn."""

from __future__ import annotations

import importlib
import importlib.util
import sys

_PACKAGE = "dreamfusion_fast.integrations.tinycudann"


def install(force: bool = False) -> bool:
    """Makes ``import tinycudann`` find this package for the rest of the process.

    Args:
        force: also where tiny-cuda-nn is installed, or imported already. Modules that have names of it keep those.

    Returns:
        Whether it does so: not where tiny-cuda-nn is installed and `force` is False.
    """
    package = sys.modules[_PACKAGE]
    if not force and _present():
        return sys.modules.get("tinycudann") is package
    for name in [name for name in sys.modules if name == "tinycudann" or name.startswith("tinycudann.")]:
        del sys.modules[name]
    sys.modules["tinycudann"] = package
    sys.modules["tinycudann.modules"] = importlib.import_module(f"{_PACKAGE}.modules")
    return True


def _present() -> bool:
    """Whether there is something of that name."""
    return "tinycudann" in sys.modules or importlib.util.find_spec("tinycudann") is not None

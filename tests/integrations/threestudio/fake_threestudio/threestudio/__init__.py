"""As much of threestudio as the plug-in asks for: the registry and the bases that its classes derive from."""

from __future__ import annotations

from collections.abc import Callable

_CLASSES: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    def add(cls: type) -> type:
        if name in _CLASSES:
            raise ValueError(f"{name} is taken")
        _CLASSES[name] = cls
        return cls

    return add


def find(name: str) -> type:
    return _CLASSES[name]

"""Reading the dictionaries that configure encodings and networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dreamfusion_fast.ops._checks import check_flag, check_number, shown

_warned: set[tuple[str, str]] = set()


class Options:
    """The options of one encoding or network, each with its default, checked as they are read.

    Keys that nobody has read by the time of `end` are ignored, as tiny-cuda-nn does, with one warning a process.

    Args:
        where: what is configured, for messages.
        config: the dictionary.
        default_otype: what it is without "otype".

    Raises:
        TypeError: no dictionary.
    """

    def __init__(self, where: str, config: Any, default_otype: str) -> None:
        if not isinstance(config, Mapping):
            raise TypeError(f"{where}: config must be a dictionary, got {shown(config)}")
        otype = config.get("otype", default_otype)
        if not isinstance(otype, str):
            raise TypeError(f"{where}: otype must be a name, got {shown(otype)}")
        self.config, self.otype, self.where = config, otype, f"{where} {otype}"
        self._read = {"otype"}

    def __contains__(self, name: str) -> bool:
        return name in self.config

    def raw(self, name: str, default: Any = None) -> Any:
        """An option as it is."""
        self._read.add(name)
        return self.config.get(name, default)

    def number(self, name: str, default: float, wanted: str, fits: Callable[[Any], bool], whole: bool = True) -> Any:
        """A number, an integer unless `whole` is False. Raises TypeError or ValueError for others."""
        value = self.raw(name, default)
        if whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        check_number(self.where, name, value, wanted, fits, whole)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or False. Raises TypeError for others."""
        value = self.raw(name, default)
        check_flag(self.where, name, value)
        return bool(value)

    def choice(self, name: str, default: str, choices: Mapping[str, Any]) -> Any:
        """The value that a name stands for, in whatever case. Raises ValueError for other names."""
        value = self.raw(name, default)
        found = {choice.lower(): meaning for choice, meaning in choices.items()}
        if not isinstance(value, str) or value.lower() not in found:
            raise ValueError(f"{self.where}: {name} must be {', '.join(choices)}, got {shown(value)}")
        return found[value.lower()]

    def end(self) -> None:
        """Says what was not understood, once."""
        for name in self.config:
            if name not in self._read and (self.where, str(name)) not in _warned:
                _warned.add((self.where, str(name)))
                warnings.warn(f"{self.where}: option {name} is unknown and ignored", stacklevel=2)

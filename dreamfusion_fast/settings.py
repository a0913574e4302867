"""Settings: dataclasses whose values are checked when they are made, whether by a file, an option or Python.

A range stands beside the field that it is for: ``steps: Annotated[int, Range(1)] = 1000``.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import numbers
import operator
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dreamfusion_fast.errors import UserError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Values of a number, or of each number in a tuple: low <= value <= high, without the ends that are `open`.

    Infinity is refused unless `high` is given as such.
    """

    low: float | None = None
    high: float | None = None
    open: Literal["", "low", "high", "both"] = ""

    def __contains__(self, value: float) -> bool:
        low = self.low is None or (value > self.low if self.open in ("low", "both") else value >= self.low)
        high = self.high is None or (value < self.high if self.open in ("high", "both") else value <= self.high)
        return low and high

    def __str__(self) -> str:
        low = f"above {self.low}" if self.open in ("low", "both") else f"at least {self.low}"
        if self.high is None or math.isinf(self.high):
            return low
        if self.low is None:
            return f"below {self.high}" if self.open == "high" else f"at most {self.high}"
        return {"": f"{self.low} to {self.high}", "high": f"{self.low} to below {self.high}"}.get(
            self.open, f"{low} and {'below' if self.open == 'both' else 'at most'} {self.high}"
        )


class SettingError(UserError, ValueError):
    """A value that a setting cannot have.

    Attributes:
        kind: the class of settings.
        name: of the setting, or of several that do not go together.
        problem: "got ..., want ...".
    """

    def __init__(self, kind: type, name: str, problem: str) -> None:
        super().__init__(f"{kind.__name__}.{name}: {problem}")
        self.kind, self.name, self.problem = kind, name, problem


class Settings:
    """Base of dataclasses of settings.

    Values have to be of the annotated types; NumPy's numbers become Python's, and lists tuples.

    Raises:
        SettingError: a wrong type, a NaN, a value out of its range, or values that do not go together.
    """

    def __post_init__(self) -> None:
        if not _UNCHECKED.get():
            self.check_values()

    def check_values(self) -> None:
        """Raise SettingError as when it is made."""
        kind: Any = type(self)
        for name, hint in _hints(kind).items():
            value = getattr(self, name)
            try:
                checked = convert(hint, value)
            except WrongValueError as error:
                raise SettingError(type(self), name + error.where, error.problem) from None
            if checked is not value:
                object.__setattr__(self, name, checked)
        self.check_together()

    def check_together(self) -> None:
        """Raise by :meth:`refuse` what no range can say."""

    def refuse(self, *names: str, want: str) -> None:
        """Raise SettingError for these settings."""
        got = ", ".join(shown(getattr(self, name)) for name in names)
        raise SettingError(type(self), ", ".join(names), f"got {got}, want {want}")


_UNCHECKED = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Leave settings that are made in the block unchecked."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def settings_in(tree: Any, prefix: str = "") -> Iterator[tuple[str, Settings]]:
    """All settings in a dataclass, the innermost first, with what stands before the names of their fields."""
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_in(value, f"{prefix}{field.name}.")
    if isinstance(tree, Settings):
        yield prefix, tree


class WrongValueError(ValueError):
    """`where` in a value ("[1]", or ""), and the `problem`: "got ..., want ..."."""

    def __init__(self, value: Any, want: str, where: str = "") -> None:
        super().__init__(want)
        self.where, self.problem = where, f"got {shown(value)}, want {want}"


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def convert(hint: Any, value: Any, from_file: bool = False) -> Any:
    """`value` as the type that `hint` says.

    Args:
        hint: a plain type, Literal, enum, Path, dataclass, or Annotated, a union, tuple, list or dict of such.
        value: what was given.
        from_file: paths and enums are text, and numbers may be, too (YAML 1.1 reads 1e-3, without a point, so).

    Raises:
        WrongValueError: it is of another type or out of its range.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        ranges = [limits for limits in hint.__metadata__ if isinstance(limits, Range)]
        if any(isinstance(value, float) and value == limits.high == math.inf for limits in ranges):
            return math.inf
        result = convert(arguments[0], value, from_file)
        for number in result if isinstance(result, tuple) else (result,):
            for limits in ranges:
                if number is not None and number not in limits:
                    raise WrongValueError(value, str(limits))
        return result
    if hint is Any:
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        raise WrongValueError(value, f"one of {', '.join(map(str, arguments))}{hint_text}")
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, from_file)
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, from_file)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise WrongValueError(value, "a mapping")
        return {key: _convert_part(arguments[1], item, from_file, f".{key}") for key, item in value.items()}
    return _convert_plain(hint, value, from_file)


def _convert_part(hint: Any, value: Any, from_file: bool, where: str) -> Any:
    try:
        return convert(hint, value, from_file)
    except WrongValueError as error:
        error.where = where + error.where
        raise


def _convert_union(choices: tuple[Any, ...], value: Any, from_file: bool) -> Any:
    kinds = [choice for choice in choices if choice is not type(None)]
    if value is None and len(kinds) < len(choices):
        return None
    errors = []
    for kind in kinds:
        try:
            return convert(kind, value, from_file)
        except WrongValueError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise WrongValueError(value, " or ".join(_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds))


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, from_file: bool) -> Any:
    if not isinstance(value, (list, tuple)):
        raise WrongValueError(value, "a list")
    kinds = arguments
    if origin is list or arguments[1:] == (Ellipsis,):
        kinds = (arguments[0],) * len(value)
    elif len(value) != len(kinds):
        raise WrongValueError(value, f"a list of {len(kinds)} values")
    pairs = enumerate(zip(kinds, value, strict=True))
    parts = [_convert_part(kind, item, from_file, f"[{i}]") for i, (kind, item) in pairs]
    return origin(parts)


def _convert_plain(hint: Any, value: Any, from_file: bool) -> Any:
    if hint is bool and type(value).__name__ in ("bool", "bool_"):  # NumPy's has a type of its own
        return bool(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return operator.index(value)
    if hint is float and not isinstance(value, bool) and isinstance(value, (numbers.Real, str)[: 1 + from_file]):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise WrongValueError(value, _WORDS[float]) from None
        if not math.isfinite(number):
            raise WrongValueError(value, "a finite number")
        return number
    if hint is str and isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise WrongValueError(value, "text without NUL and invalid characters")
        return value
    if hint in _WORDS:
        raise WrongValueError(value, _WORDS[hint])
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    if isinstance(hint, type) and issubclass(hint, Path) and isinstance(value, str):
        return hint(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if from_file and any(value == item.value for item in hint):
            return hint(value)
        raise WrongValueError(value, "one of " + ", ".join(str(item.value) for item in hint))
    if isinstance(hint, type):
        raise WrongValueError(value, f"a {'path' if issubclass(hint, Path) else hint.__name__}")
    raise TypeError(f"a setting of type {hint} cannot be checked")


def shown(value: Any) -> str:
    """`value` in a message, shortened to a part of one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"a number of too many digits, or a {type(value).__name__} of such"
    return text if len(text) <= 60 else text[:57] + "..."

"""Trees of dataclasses as plain values and YAML, with errors that name the key.

Knows nothing of what is configured: any dataclass whose fields are plain values, tuples, lists, dicts, enums, paths or
other such dataclasses will do. In a union of dataclasses, each has a field `kind` with a default of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dreamfusion_fast.errors import UserError, joined, one_line
from dreamfusion_fast.io import user_path, write_text
from dreamfusion_fast.settings import SettingError, WrongValueError, convert, shown

T = TypeVar("T")

# Characters and levels; a whole config has 5,000 and 3.
_LARGEST_YAML, _DEEPEST_YAML = 2**17, 16
_TOO_LARGE = "has more than {} characters, which no config has".format


def to_dict(value: Any) -> Any:
    """`value` (a dataclass or a part of one) as dicts, lists and plain values, in the order of the fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    return value


def from_dict(cls: type[T], values: Mapping[str, Any], *, source: str = "config", base: T | None = None) -> T:
    """Build the dataclass `cls` from nested dicts; what is not given comes from `base`, else from the defaults.

    Raises UserError naming the key for an unknown key (with the nearest known ones), a wrong type, and a value that the
    dataclass itself refuses. `source` is what the message calls the origin of the values, such as the file's name.
    """
    return _dataclass_from(cls, values, source, "", base)


def dump_yaml(config: Any) -> str:
    """`config` as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def save_yaml(config: Any, path: str | Path) -> None:
    """Write `config` to `path` as YAML, whole or not at all."""
    write_text(path, dump_yaml(config))


def load_yaml(path: str | Path) -> Any:
    """The values of the YAML file `path`. UserError where it cannot be read."""
    try:
        with user_path(path, "config").open("rb") as file:
            text = file.read(_LARGEST_YAML + 1).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        if error.start > _LARGEST_YAML - 4:  # cut within a letter
            raise UserError(f"config {path} {_TOO_LARGE(_LARGEST_YAML)}") from error
        raise UserError(f"config {path} is no text file") from error
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str = "config", largest: int = _LARGEST_YAML) -> Any:
    """Like load_yaml, from text of at most `largest` characters; an empty one holds an empty dict."""
    if len(text) > largest:
        raise UserError(f"{source} {_TOO_LARGE(largest)}")
    try:
        values = yaml.load(text, _Loader)
    except Exception as error:  # of many kinds: PyYAML leaves dates, numbers and tags to Python
        raise UserError(f"{source} is no valid YAML: {one_line(joined(error))}") from error
    return {} if values is None else values


class _Loader(yaml.SafeLoader):
    """Within limits. Aliases are refused, since a few hundred bytes of them can stand for a billion values."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not taken: *{self.peek_event().anchor}")
        if self._depth == _DEEPEST_YAML:
            raise yaml.YAMLError(f"more than {_DEEPEST_YAML} levels deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """The differences between two nested dicts, as lines "field.levels: 16, here 8"."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        lines = []
        for key in [*first, *(key for key in second if key not in first)]:
            name = f"{prefix}.{key}" if prefix else str(key)
            if key not in first or key not in second:
                lines.append(f"{name}: {first.get(key, 'absent')}, here {second.get(key, 'absent')}")
            else:
                lines.extend(differences(first[key], second[key], name))
        return lines
    return [] if first == second else [f"{prefix}: {first}, here {second}"]


# Of dataclass fields that decide the names, shapes or meaning of parameters.
ARCHITECTURE = {"architecture": True}


def architecture(config: Any) -> dict[str, Any]:
    """The fields marked by `ARCHITECTURE`, at any depth, as nested dicts of plain values."""
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("architecture"):
            result[field.name] = to_dict(value)
        elif dataclasses.is_dataclass(value) and (below := architecture(value)):
            result[field.name] = below
    return result


def _dataclass_from(cls: Any, values: Any, source: str, prefix: str, base: Any) -> Any:
    where = f"{source}: {prefix}" if prefix else source
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: got {shown(values)}, want a mapping of names to values")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = get_type_hints(cls, include_extras=True)
    arguments = {name: getattr(base, name) for name in fields} if type(base) is cls else {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{source}: unknown key {name}; {hint}")
        below = arguments[key] if key in arguments else _default(fields[key])
        arguments[key] = _convert(hints[key], value, source, name, below)
    try:
        return cls(**arguments)
    except SettingError as error:
        name = f"{prefix}.{error.name}" if prefix and error.kind is cls else error.name
        raise UserError(f"{source}: {name}: {error.problem}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _convert(hint: Any, value: Any, source: str, name: str, below: Any) -> Any:
    while hasattr(hint, "__metadata__") and _dataclasses_of(hint.__origin__):
        hint = hint.__origin__
    if kinds := _dataclasses_of(hint):
        return _dataclass_from(_of_kind(kinds, value, source, name, below), value, source, name, below)
    try:
        return convert(hint, value, from_file=True)
    except WrongValueError as error:
        raise UserError(f"{source}: {name}{error.where}: {error.problem}") from None


def _dataclasses_of(hint: Any) -> list[Any]:
    """The dataclass that `hint` is, or those that it is a union of."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return list(kinds) if all(dataclasses.is_dataclass(kind) for kind in kinds) else []


def _of_kind(choices: list[Any], value: Any, source: str, name: str, below: Any) -> Any:
    """The dataclass whose default `kind` is that of `value`, or of what is below it."""
    if len(choices) == 1:
        return choices[0]
    by_kind = {choice.kind: choice for choice in choices}
    kind = getattr(below, "kind", None)
    if isinstance(value, Mapping):
        kind = value.get("kind", kind)
    if kind not in by_kind:
        raise UserError(f"{source}: {name}.kind: got {shown(kind)}, want one of {', '.join(by_kind)}")
    return by_kind[kind]

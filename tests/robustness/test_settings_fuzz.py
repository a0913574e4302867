"""Wrong settings, made from the types and ranges that the settings declare, through Python, a file and options.

Each ends in one line that names the setting, before anything is written or run. About 200 cases, the same ones each
time. DREAMFUSION_FAST_LONG_TESTS=1 makes 2,000 that differ from run to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from forms import LONG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dreamfusion_fast.cli import main
from dreamfusion_fast.export import turntable  # noqa: F401 (imported here, since the first import takes seconds)
from dreamfusion_fast.guidance.models.embedded import sample
from dreamfusion_fast.settings import Range, SettingError
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.generator import Generator

CASES = 2_000 if LONG else 200
MOST_SECONDS = 10.0
DOORS = ("python", "file", "generate", "export", "sample")
SETTINGS = settings(
    max_examples=CASES // len(DOORS),
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """`owner` holds it under the last part of `key`; `hint` is its type, without the ranges."""

    key: str
    owner: Any
    hint: Any
    ranges: tuple[Range, ...]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def option(self) -> str:
        return "--" + self.key.replace("_", "-")


def settings_of(owner: Any, prefix: str = "") -> Iterator[Setting]:
    """All of a tree, sections included."""
    for name, hint in get_type_hints(type(owner), include_extras=True).items():
        value, ranges = getattr(owner, name), ()
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            ranges = tuple(note for note in notes if isinstance(note, Range))
        yield Setting(f"{prefix}{name}", owner, hint, ranges)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{name}.")


TREE = list(settings_of(Config("x")))
# What `sample` declares inside the command.
SAMPLE = [
    Setting("n", None, int, (Range(1, 1024),)),
    Setting("seed", None, int, (Range(0, 2**63 - 1),)),
    Setting("guidance_scale", None, float, (Range(-1000, 1000),)),
    Setting("steps", None, int, (Range(1, 1000),)),
]

HUGE = 10**400
WHOLE = (-1, 0, -(2**31), 2**31, 2**63, -(2**63), HUGE, -HUGE)
REAL = (*WHOLE, math.nan, math.inf, -math.inf, -1e-9, -0.5, 0.0, 1.0, 1.0 + 1e-6, 3.7, 1e19, -1e19, 1e300, 5e-324)


def choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def wrong_numbers(setting: Setting, kind: type) -> list[Any]:
    def fits(number: Any) -> bool:
        try:
            if kind is float and not math.isfinite(float(number)):
                return number == math.inf and any(limits.high == math.inf for limits in setting.ranges)
        except OverflowError:
            return False
        return all(number in limits for limits in setting.ranges)

    edges = [edge for limits in setting.ranges for edge in (limits.low, limits.high) if edge is not None]
    near = [edge + off for edge in edges if math.isfinite(edge) for off in (-1, 0, 1)]
    if kind is int:
        return [number for number in (*WHOLE, *map(int, near)) if not fits(number)] + [1.5, math.nan, math.inf]
    return [
        number for number in (*REAL, *near, *(edge + off for edge in near for off in (-1e-3, 1e-3))) if not fits(number)
    ]


def wrong_values(setting: Setting, hint: Any = None) -> list[Any]:
    """Values that it cannot have, as Python objects."""
    kinds = choices(setting.hint if hint is None else hint)
    others: list[Any] = [{}, {"x": 1}, [], [[1]], b"x"]
    others += [None] * (type(None) not in kinds)
    for kind in kinds:
        if get_origin(kind) is tuple:
            parts = get_args(kind)
            value = list(getattr(setting.owner, setting.name) or [1] * len(parts))
            wrong = wrong_values(setting, parts[0])
            others = [other for other in others if other != []] if Ellipsis in parts else others
            others += [[bad, *value[1:]] for bad in wrong] + [value[:-1], [*value, value[-1]], "x", 3]
        elif kind in (int, float):
            others += wrong_numbers(setting, kind) if str not in kinds else []
            others += [True, "", "x", "nan?", "1,5"] if str not in kinds else []
        elif kind is bool:
            others += [0, 1, 2.0, "", "x", "yes?"]
        elif kind is str:
            others += [True, 1.5, "a\0b", "a\udc80"] + [3, HUGE] * (int not in kinds)
        elif get_origin(kind) is Literal:
            others += [0, 1.5, "", "x", *(f"{choice}x" for choice in get_args(kind))]
            others += [choice.upper() for choice in get_args(kind) if isinstance(choice, str)]
        elif dataclasses.is_dataclass(kind):
            others = [None, 3, "x", [], [1], b"x", True]
    return others


def assert_refused(arguments: list[str], name: str, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    printed, out = io.StringIO(), io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(out):
        code = main(arguments)
    seconds, message = time.monotonic() - start, printed.getvalue()
    assert code == 2, (arguments, code, message)
    assert out.getvalue() == ""
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert message.endswith("\n")
    assert len(message) < 1000
    assert name in message, (arguments, message)
    assert seconds < MOST_SECONDS
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands work; there is a run in it. What comes after the settings fails."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("it was run")

    for method in ("run", "export"):
        monkeypatch.setattr(Generator, method, started)
    monkeypatch.setattr(sample, "sample_images", started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    Config("x").save(tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    return tmp_path


def test_python_refuses() -> None:
    cases = [(setting, value) for setting in TREE for value in wrong_values(setting)]
    cases += [(setting, sign * 10**5000) for setting, value in cases if value == HUGE for sign in (1, -1)]

    @SETTINGS
    @given(st.data())
    def run(data: st.DataObject) -> None:
        setting, value = data.draw(st.sampled_from(cases))
        with pytest.raises(SettingError) as error:
            dataclasses.replace(setting.owner, **{setting.name: value})
        message = str(error.value)
        assert message.startswith(f"{type(setting.owner).__name__}.")
        assert setting.name in message.partition(":")[0]
        assert "\n" not in message
        assert len(message) < 500

    run()


def in_yaml(setting: Setting, value: Any) -> bool:
    """Whether a file can hold it and is wrong with it: an empty section leaves all as it is."""
    if isinstance(value, list):
        return all(in_yaml(setting, item) for item in value)
    return value != "a\udc80" and not (value == {} and dataclasses.is_dataclass(setting.hint))


def test_a_file_is_refused(folder: Path) -> None:
    cases = [(setting, value) for setting in TREE for value in wrong_values(setting) if in_yaml(setting, value)]

    @SETTINGS
    @given(st.data())
    def run(data: st.DataObject) -> None:
        setting, value = data.draw(st.sampled_from(cases))
        *sections, name = setting.key.split(".")
        if data.draw(st.sampled_from([False] * 7 + [True]), label="misspelt"):
            name = data.draw(st.sampled_from([f"{name}x", name[1:] + "_", name.upper(), "x y"]))
        tree = {name: value}
        for section in reversed(sections):
            tree = {section: tree}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        assert_refused(["generate", "x", "--config", "config.yaml", "--out", "new"], name, folder)

    run()


def words(setting: Setting, value: Any) -> list[str] | None:
    """What a person would type for it; None where there is no such thing."""
    if isinstance(value, list):
        several = any(get_origin(kind) is tuple for kind in choices(setting.hint))
        parts = [None if isinstance(item, list) else words(setting, item) for item in value]
        return None if None in parts or not (parts and several) else [word for part in parts for word in part or []]
    if isinstance(value, (dict, bytes, bool)) or value is None or value == "":
        return None
    return [str(value)]


def refused_options(folder: Path, tree: list[Setting], command: list[str]) -> None:
    # Flags take no value, text takes all, and sections are none.
    typed_ones = [x for x in tree if not (set(choices(x.hint)) & {bool, str} or dataclasses.is_dataclass(x.hint))]
    typed = [(setting, words(setting, value)) for setting in typed_ones for value in wrong_values(setting)]
    cases = [(x.option, given) for x, given in typed if given is not None]

    @SETTINGS
    @given(st.data())
    def run(data: st.DataObject) -> None:
        option, given = data.draw(st.sampled_from(cases))
        assert_refused([*command, option, *given], option, folder)

    run()


@pytest.mark.slow
def test_options_of_generate_are_refused(folder: Path) -> None:
    refused_options(folder, TREE, ["generate", "x", "--out", "new"])


def test_options_of_export_are_refused(folder: Path) -> None:
    own = [dataclasses.replace(x, key=x.name) for x in TREE if x.key.startswith("export.")]
    refused_options(folder, own, ["export", "run", "--out", "new"])


def test_options_of_sample_are_refused(folder: Path) -> None:
    refused_options(folder, SAMPLE, ["sample", "x", "--out", "new/grid.png"])

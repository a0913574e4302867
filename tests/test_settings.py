"""Every setting is checked in one and the same way, from Python, files and options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from dreamfusion_fast.cli import main
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.settings import Range, SettingError, Settings
from dreamfusion_fast.training.config import Config


def numbers_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, list[Range], bool]]:
    """Key, settings, name, ranges and wholeness of all numbers in a tree of settings."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from numbers_of(value, f"{prefix}{name}.")
            continue
        ranges = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
        kinds = {hint, *get_args(hint)} | {kind for part in get_args(hint) for kind in get_args(part)}
        if get_origin(hint) is not Literal and not kinds.isdisjoint({int, float}) and str not in kinds:
            yield f"{prefix}{name}", config, name, ranges, float not in kinds


NUMBERS = list(numbers_of(Config("x")))
CASES = [pytest.param(*rest, id=key) for key, *rest in NUMBERS]


def with_number(config: Any, name: str, number: Any) -> Any:
    """A copy with `number` there; in a tuple, first."""
    value = getattr(config, name)
    return dataclasses.replace(config, **{name: (number, *value[1:]) if isinstance(value, tuple) else number})


def test_all_are_found() -> None:
    assert len(NUMBERS) > 90
    assert {"steps", "optim.lr_mlp", "optim.betas", "field.levels", "camera.fov_deg", "loss.opacity.start"} <= {
        key for key, *_ in NUMBERS
    }


@pytest.mark.parametrize(("config", "name", "ranges", "whole"), CASES)
def test_every_number_has_a_range_and_is_held_to_it(config: Any, name: str, ranges: list[Range], whole: bool) -> None:
    assert ranges
    (limits,) = ranges
    wrong: list[Any] = [math.nan, -math.inf, "3", True, b"3"]
    if limits.high != math.inf:
        wrong.append(math.inf)
    if limits.low is not None:
        wrong.append((int if whole else float)(limits.low) - 1)
        wrong += [limits.low] if limits.open in ("low", "both") else []
    if limits.high is not None and math.isfinite(limits.high):
        wrong.append((int if whole else float)(limits.high) * 2 + 1)
        wrong += [limits.high] if limits.open in ("high", "both") else []
    wrong += [1.5] if whole else []
    for number in wrong:
        with pytest.raises(SettingError, match=rf"^{type(config).__name__}\.{name}(\[0\])?: got "):
            with_number(config, name, number)


@pytest.mark.parametrize(("config", "name", "ranges", "whole"), CASES)
def test_numbers_of_numpy_become_pythons(config: Any, name: str, ranges: list[Range], whole: bool) -> None:
    value = getattr(config, name)
    number = value[0] if isinstance(value, tuple) else value
    if number is None or (whole and number > 2**62):
        return
    found = getattr(with_number(config, name, np.int64(number) if whole else np.float64(number)), name)
    found = found[0] if isinstance(found, tuple) else found
    assert type(found) is (int if whole else float)
    assert found == number


def test_what_python_was_given_can_be_written_and_read() -> None:
    config = Config("x", steps=np.int64(3), optim=dataclasses.replace(Config().optim, lr_table=np.float64(0.01)))  # type: ignore[arg-type]
    assert Config.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3.0}, "Config.steps: got 3.0, want a whole number"),
        ({"prompt": b"x"}, "Config.prompt: got b'x', want text"),
        ({"prompt": "a\udc80"}, "want text without NUL and invalid characters"),
        ({"out": "a\0b"}, "want text without NUL and invalid characters"),
        ({"seed": 10**25}, "Config.seed: got 10000000000000000000000000, want 0 to "),
        ({"field": 3}, "Config.field: got 3, want HashGridFieldConfig or TriplaneFieldConfig"),
        ({"profile": 1}, "Config.profile: got 1, want true or false"),
    ],
)
def test_wrong_types_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as error:
        Config(**({"prompt": "x"} | settings))
    assert message in str(error.value)
    assert isinstance(error.value, (UserError, ValueError))


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--schedule.render-size", "0", "--schedule.render-size: got 0, want 1 to 4096"),
        ("--optim.lr-mlp", "-1", "--optim.lr-mlp: got -1.0, want at least 0"),
        ("--optim.betas", ("2", "2"), "--optim.betas: got (2.0, 2.0), want 0 to below 1"),
        ("--shading.light-distance", ("0", "0"), "--shading.light-distance: got (0.0, 0.0), want above 0"),
        ("--export.threshold", "nan", "--export.threshold: got nan, want a finite number"),
        ("--export.turntable-fps", str(10**20), "--export.turntable-fps: got 1"),
        ("--seed", str(10**24), "--seed: got 1"),
        ("--loss.opacity.begin", "2", "--loss.opacity.begin: got 2.0, want 0 to 1"),
        ("--schedule.t-max-end", "0.01", "--schedule.t-min, --schedule.t-max-end, --schedule.t-max: got 0.02, 0.01, "),
    ],
)
def test_options_are_named(option: str, value: Any, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = value if isinstance(value, tuple) else (value,)
    assert main(["generate", "x", option, *values]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"error: {wanted}")


@dataclass(frozen=True)
class Open(Settings):
    low: Annotated[float, Range(0, 1, open="low")] = 0.5
    high: Annotated[float, Range(0, 1, open="high")] = 0.5
    far: Annotated[float, Range(1, math.inf)] = math.inf
    below: Annotated[int | None, Range(high=3)] = None


def test_ends_of_ranges() -> None:
    assert Open(1, 0) == Open(1.0, 0.0)
    assert Open(far=math.inf).far == math.inf
    assert Open(below=-(10**9)).below == -(10**9)
    for wrong, message in (
        ({"low": 0}, "low: got 0, want above 0 and at most 1"),
        ({"high": 1}, "high: got 1, want 0 to below 1"),
        ({"far": 0.5}, "far: got 0.5, want at least 1"),
        ({"below": 4}, "below: got 4, want at most 3"),
    ):
        with pytest.raises(SettingError, match=message):
            Open(**wrong)  # type: ignore[arg-type]

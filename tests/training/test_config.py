"""The config tree: round trips, and mistakes are named."""

from __future__ import annotations

import dataclasses
import enum
import math
from pathlib import Path
from typing import Literal

import pytest
import tyro

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.fields import TriplaneFieldConfig
from dreamfusion_fast.training import config_io
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.sections import ExportConfig, LossConfig, Ramp, ScheduleConfig, ShadingConfig


def test_default_round_trip():
    config = Config(prompt="ein Stuhl: schön")
    assert Config.from_yaml(config.to_yaml()) == config
    assert Config.from_dict(config.to_dict()) == config


def test_changed_values_survive_a_file(tmp_path):
    config = dataclasses.replace(
        Config(prompt="x"),
        steps=7,
        loss=LossConfig(ray_entropy=Ramp(0.0, 0.5, 0.25, 0.75)),
        export=ExportConfig(threshold=3.5),
    )
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config


def test_partial_file_keeps_defaults():
    config = Config.from_yaml("prompt: a chair\noptim: {lr_table: 1e-3, betas: [0.8, 0.95]}\n")
    assert config.optim.lr_table == 1e-3
    assert config.optim.betas == (0.8, 0.95)
    assert config.optim.lr_mlp == Config().optim.lr_mlp
    assert config.steps == Config().steps
    assert Config.from_yaml("") == Config()


def test_partial_file_keeps_a_nested_default_that_is_not_the_class_default():
    assert Config.from_yaml("loss: {orientation: {end: 0.5}}").loss.orientation == dataclasses.replace(
        LossConfig().orientation, end=0.5
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"unknown key stepz; did you mean steps\?"),
        ("optim: {lr_tabel: 3}", r"unknown key optim\.lr_tabel; did you mean lr_table"),
        ("qqqqqqqq: 3", r"unknown key qqqqqqqq; known: prompt, out"),
        ("steps: many", r"steps: got 'many', want a whole number"),
        ("steps: 1.5", r"steps: got 1\.5, want a whole number"),
        ("steps: true", r"steps: got True, want a whole number"),
        ("optim: {lr_table: fast}", r"optim\.lr_table: got 'fast', want a number"),
        ("optim: 3", r"optim: got 3, want a mapping"),
        ("optim: {betas: [0.9]}", r"optim\.betas: got .*, want a list of 2 values"),
        ("optim: {betas: [0.9, x]}", r"optim\.betas\[1\]: got .*, want a number"),
        ("prompt: 3", r"prompt: got 3, want text"),
        ("memory: true", r"memory: got True, want text or a whole number"),
        ("memory: 1.5", r"memory: got 1\.5, want text or a whole number"),
        ("memory: [1]", r"memory: got \[1\], want text or a whole number"),
        ("log: {tensorboard: 1}", r"log\.tensorboard: got 1, want true or false"),
        ("export: {threshold: no}", r"export\.threshold: got False, want a number"),
        ("export: {resolution: 2}", r"export\.resolution: got 2, want 8 to 1024"),
        ("- a", r"want a mapping"),
        ("a: [", r"no valid YAML"),
    ],
)
def test_mistakes_are_named_on_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        Config.from_yaml(text, source="my.yaml")
    assert "my.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read config .*No such file"):
        Config.load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text file"):
        Config.load(tmp_path / "binary.yaml")


def test_an_old_file_with_a_range_that_never_acted_is_read(said):
    """The range of a run's timesteps is that of its schedule, and has no other setting."""
    config = Config.from_yaml("prompt: x\nguidance: {t_range: [0.02, 0.98]}")
    assert config == Config(prompt="x")
    assert "t_range" not in config.to_yaml()
    assert said() == []
    text = "prompt: x\nguidance: {guidance_scale: 7.5, t_range: [0.1, 0.5]}\nschedule: {t_min: 0.05}"
    config = Config.from_yaml(text, source="my.yaml")
    assert (config.guidance.guidance_scale, config.schedule.t_range(0.0)) == (7.5, (0.05, 0.98))
    assert said() == [
        "my.yaml: guidance.t_range is ignored, as it always was in a run; "
        "set schedule.t_min, schedule.t_max and schedule.t_max_end"
    ]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Kinds:
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    path: Path = Path("a/b")
    sizes: tuple[int, ...] = (1, 2, 3)
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])
    table: dict[str, float] = dataclasses.field(default_factory=lambda: {"x": 1.0})
    maybe: tuple[float, float] | None = None


def test_the_entropy_of_rays_under_its_old_name():
    config = Config.from_yaml("prompt: x\nloss: {entropy: {start: 0.25}, opacity: {end: 0.5}}")
    assert (config.loss.ray_entropy.start, config.loss.opacity.end) == (0.25, 0.5)
    assert "\n  entropy:" not in config.to_yaml()


def test_every_kind_of_field_round_trips():
    kinds = Kinds(mode="slow", sizes=(), maybe=(1.0, 2.0))
    assert config_io.from_dict(Kinds, config_io.parse_yaml(config_io.dump_yaml(kinds))) == kinds
    assert config_io.from_dict(Kinds, config_io.parse_yaml(config_io.dump_yaml(Kinds()))) == Kinds()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "slwo"}, r"mode: got 'slwo', want one of fast, slow; did you mean slow\?"),
        ({"colour": "blue"}, "colour: got .*, want one of red"),
        ({"path": 1}, "path: got 1, want a path"),
        ({"sizes": [1, "a"]}, r"sizes\[1\]: got .a., want a whole number"),
        ({"table": {"x": "y"}}, r"table\.x: got .y., want a number"),
        ({"table": 1}, "table: got 1, want a mapping"),
        ({"maybe": [1]}, "maybe: got .*, want a list of 2 values"),
    ],
)
def test_every_kind_of_field_is_checked(values, message):
    with pytest.raises(UserError, match=message):
        config_io.from_dict(Kinds, values)


def test_base_is_kept_where_nothing_is_given():
    assert config_io.from_dict(Kinds, {"mode": "slow"}, base=Kinds(sizes=(9,))) == Kinds(mode="slow", sizes=(9,))


@dataclasses.dataclass(frozen=True)
class Ball:
    kind: Literal["ball"] = "ball"
    radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Box:
    kind: Literal["box"] = "box"
    side: float = 2.0


@dataclasses.dataclass(frozen=True)
class Shape:
    shape: Ball | Box = Ball(radius=3.0)


def test_configs_of_several_kinds_are_told_apart():
    for shape in (Ball(), Box(side=5.0)):
        assert config_io.from_dict(Shape, config_io.to_dict(Shape(shape))) == Shape(shape)
    # What is below of the same kind is kept, and nothing of another kind's.
    assert config_io.from_dict(Shape, {"shape": {}}) == Shape()
    assert config_io.from_dict(Shape, {"shape": {"kind": "box"}}) == Shape(Box())
    assert config_io.from_dict(Shape, {"shape": {"side": 4.0}}, base=Shape(Box())) == Shape(Box(side=4.0))
    with pytest.raises(UserError, match=r"shape\.kind: got 'cone', want one of ball, box"):
        config_io.from_dict(Shape, {"shape": {"kind": "cone"}})
    with pytest.raises(UserError, match=r"unknown key shape\.side"):
        config_io.from_dict(Shape, {"shape": {"kind": "ball", "side": 1.0}})


def test_a_triplane_in_place_of_the_hash_grid():
    config = Config(prompt="x").with_field("triplane")
    assert Config.from_yaml(config.to_yaml()) == config
    assert config.with_field("triplane").field == config.field
    assert config.with_field("hash_grid").field.hidden == config.field.hidden
    assert Config.for_guidance("sdxl").with_field("triplane").field.resolution == 256
    only_kind = Config.from_dict({"prompt": "x", "field": {"kind": "triplane"}})
    assert only_kind.field == TriplaneFieldConfig()
    with pytest.raises(UserError, match=r"unknown key field\.levels"):
        Config.from_dict({"prompt": "x", "field": {"kind": "triplane", "levels": 3}})
    with pytest.raises(UserError, match=r"--field\.scenes: got 2, want 1"):
        Config(prompt="x", field=TriplaneFieldConfig(scenes=2)).check()


def test_differences():
    assert config_io.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}}) == [
        "a.c: 2, here 3",
        "a.d: absent, here 4",
    ]


@pytest.mark.parametrize(
    ("text", "memory"), [("16000000000", 16_000_000_000), ("16GB", "16GB"), ("'16000'", "16000"), ("null", None)]
)
def test_memory_is_a_size_or_a_number_of_bytes(text, memory):
    config = Config.from_yaml(f"prompt: x\nmemory: {text}")
    config.check()
    assert config.memory == memory
    assert Config.from_yaml(config.to_yaml()) == config
    # A file's values are the command line's defaults.
    assert tyro.cli(Config, args=[], default=config) == config
    assert tyro.cli(Config, args=["--memory", "2000000000"], default=config).memory == "2000000000"


@pytest.mark.parametrize("memory", [0, -1, True, "0", "-1"])
def test_memory_that_is_none_is_refused(memory):
    with pytest.raises(UserError, match=f"memory has to be a size .*, not {memory!r}|memory: got True, want text or"):
        Config(prompt="x", memory=memory).check()


def test_check_refuses_what_cannot_run():
    Config(prompt="a chair").check()
    with pytest.raises(UserError, match="the prompt is empty"):
        Config(prompt="  ").check()
    with pytest.raises(UserError, match="steps: got 0, want at least 1"):
        Config(prompt="x", steps=0).check()


def test_ramp():
    ramp = Ramp(1.0, 3.0, 0.25, 0.75)
    assert [ramp.at(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert Ramp(1.0, 2.0, 0.5, 0.5).at(0.4) == 1.0
    assert Ramp(1.0, 2.0, 0.5, 0.5).at(0.5) == 2.0
    with pytest.raises(ValueError, match="begin <= until"):
        Ramp(0, 0, 0.6, 0.5)


def test_schedule():
    schedule = ScheduleConfig(
        t_min=0.1, t_max=0.9, t_max_end=0.5, render_size_start=32, render_size=64, render_size_until=0.4
    )
    assert schedule.t_range(0.0) == (0.1, 0.9)
    assert schedule.t_range(1.0) == (0.1, 0.5)
    assert schedule.t_range(0.25)[1] == pytest.approx(0.8)
    assert dataclasses.replace(schedule, t_anneal="sqrt").t_range(0.25)[1] == pytest.approx(0.7)
    assert dataclasses.replace(schedule, t_anneal="none").t_range(1.0) == (0.1, 0.9)
    exact = dataclasses.replace(schedule, t_draw="exact")
    assert exact.t_range(0.25) == (schedule.t_range(0.25)[1],) * 2
    assert (schedule.size(0.39), schedule.size(0.4)) == (32, 64)


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="t_min < t_max_end"):
        ScheduleConfig(t_min=0.9, t_max_end=0.5)
    with pytest.raises(ValueError, match="t_anneal: got 'cubic', want one of"):
        ScheduleConfig(t_anneal="cubic")
    with pytest.raises(ValueError, match="sum of at most 1"):
        ShadingConfig(albedo_probability=0.7, textureless_probability=0.4)


def test_dreamtime_schedule_is_its_argmin():
    """Equation by equation, over 1000 timesteps."""
    m1, m2, s1, s2 = 700, 400, 200, 150
    schedule = ScheduleConfig(t_min=0.02, t_max=0.98, t_anneal="dreamtime", dreamtime=(0.7, 0.4, 0.2, 0.15))
    importance = {
        t: math.exp(-((t - m1) ** 2) / (2 * s1**2))
        if t > m1
        else math.exp(-((t - m2) ** 2) / (2 * s2**2))
        if t < m2
        else 1
        for t in range(20, 981)
    }
    total, tail, sums = sum(importance.values()), 0.0, {}
    for t in reversed(importance):
        tail += importance[t] / total
        sums[t] = tail
    found = []
    for step in range(0, 401, 7):
        low, high = schedule.t_range(step / 400)
        assert low == high
        found.append(round(1000 * low))
        distances = {t: abs(value - step / 400) for t, value in sums.items()}
        assert distances[found[-1]] == pytest.approx(min(distances.values()), abs=1e-12)
    assert found == sorted(found, reverse=True)
    assert (found[0], schedule.t_range(1.0)) == (980, (0.02, 0.02))


def test_importance_has_its_middle_in_order():
    with pytest.raises(UserError, match=r"dreamtime: got \(0.4, 0.5, 0.3, 0.1\), want m2 <= m1"):
        ScheduleConfig(dreamtime=(0.4, 0.5, 0.3, 0.1))


def test_guidance_of_an_older_config_means_what_it_did():
    config = Config.from_yaml("prompt: x\nguidance: {mode: csd, weighting: sds, convention: text, grad_clip: 0.5}")
    assert config.guidance.modes == ("csd", None)
    assert (config.guidance.weighting, config.guidance.grad_clip_end) == ("sds", None)

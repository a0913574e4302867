"""Presets say what the recipes say that they are named after, in this package's units, and run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fakes import BallGuidance

from dreamfusion_fast.cli import main
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.presets import preset_names
from dreamfusion_fast.training.trainer import Trainer

# Of the projects' own files: half side of the scene box or radius of the ball, cameras and light in those units, side
# of the guidance's images in pixels, weights of the losses as they stand there, steps, and albedo-only steps.
THEIRS = {
    "threestudio-sd": (2.0, (1.5, 2.0), (0.8, 1.5), 512, (10.0, 1000.0, 1.0), 10_000, 2001),
    "threestudio-if": (2.0, (1.5, 2.0), (0.8, 1.5), 64, (10.0, 1000.0, 1.0), 10_000, 2001),
    "sdi": (2.0, (1.5, 2.0), (0.8, 1.5), 512, (10.0, 1000.0, 1.0), 10_000, 2001),
    "prolificdreamer": (1.0, (1.0, 1.5), None, 512, (0.0, 0.0, 10.0), 25_000, 25_000),
    "dreamfusion": (1.4, (1.0, 1.5), (0.8, 1.5), None, (1e-4, 1e-2, 1e-3), 15_000, 1000),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_in_our_units(name: str) -> None:
    unit, distance, light, pixels, weights, steps, albedo_steps = THEIRS[name]
    config = Config.from_preset(name, prompt="a kite")
    assert config.camera.distance == pytest.approx([x / unit for x in distance], rel=1e-3)
    if light is not None:
        assert config.shading.light_distance == pytest.approx([x / unit for x in light], rel=1e-3)
    assert config.camera.position_jitter == pytest.approx(0.1 / unit, rel=1e-3)
    assert config.camera.look_at_jitter == pytest.approx(0.2 / unit, rel=2e-3)
    per_pixel = 1.0 if pixels is None else 1.0 / pixels**2
    ours = (config.loss.orientation.start, config.loss.orientation.end, config.loss.opacity.start)
    assert ours == pytest.approx([weight * per_pixel for weight in weights], rel=2e-3)
    assert (config.steps, config.shading.albedo_steps) == (steps, pytest.approx(albedo_steps / steps, rel=1e-3))
    times = [(0.98, 0.98), (0.2, 0.2)] if name == "sdi" else [(0.02, 0.98)] * 2
    for progress, time in zip((0.0, 1.0), times, strict=True):
        assert config.schedule.t_range(progress) == pytest.approx(time)
    if name != "dreamfusion":  # softplus(10 (1 - r / 0.5)) per unit of theirs, where it is not near 0
        blob = config.field
        radius = torch.linspace(0, 0.7, 8) / unit
        here = torch.nn.functional.softplus(blob.blob_scale * (1 - radius / blob.blob_radius))
        there = torch.nn.functional.softplus(10 * (1 - unit * radius / 0.5))
        assert (here - unit * there).abs().max() < 1.4  # of up to 20: where both are about to vanish
        assert here[0] == pytest.approx(float(unit * there[0]), rel=1e-4)


@pytest.mark.parametrize("name", preset_names())
def test_it_runs_and_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    config = Config.from_preset(name, prompt="a kite")
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config
    small = dataclasses.replace(
        config,
        field=dataclasses.replace(config.field, log2_rows=10, finest_resolution=32),
        renderer=dataclasses.replace(config.renderer, samples_across=64),
        schedule=dataclasses.replace(config.schedule, render_size_start=8, render_size=8),
    )
    trainer = Trainer(small, torch.device("cpu"), BallGuidance())
    for _ in range(2):
        result = trainer.step()
    assert result.size == 8
    trainer.check_parameters()


def test_a_file_wins_over_the_preset_and_options_over_both(
    tmp_path: Path, made: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("steps: 7\nbatch: 3\n")
    arguments = ["generate", "a kite", "--preset", "threestudio-sd", "--device", "cpu"]
    assert main([*arguments, "--guidance.name", "sdxl"]) == 130
    assert main([*arguments, "--config", str(file), "--batch", "2"]) == 130
    assert main(["generate", "--preset", "threestudio-sd", "--resume", str(tmp_path)]) == 2
    assert main(["generate", "a kite", "--preset", "threestudio-dd"]) == 2
    wanted = Config.from_preset("threestudio-sd", prompt="a kite", device="cpu")
    assert made == [
        dataclasses.replace(wanted, guidance=dataclasses.replace(wanted.guidance, name="sdxl")),
        dataclasses.replace(wanted, steps=7, batch=2),
    ]
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert first == "error: give --preset or --resume, not both; a resumed run has its own config"
    assert second.startswith("error: unknown preset 'threestudio-dd'; known: dreamfusion, ")
    assert second.endswith("did you mean threestudio-sd?")


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match=r"unknown preset '\.\./x'; known: "):
        Config.from_preset("../x")

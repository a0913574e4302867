"""The settings that a run starts from, by the model that guides it: in Python, in YAML and on the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dreamfusion_fast import Generator
from dreamfusion_fast.cli import main
from dreamfusion_fast.fields import HashGridFieldConfig
from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE
from dreamfusion_fast.rendering import RendererConfig
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.presets import is_small

LARGE = Config.for_guidance("stable-diffusion")


def folder_of(path: Path, sample_size: Any, levels: int | None) -> str:
    (path / "unet").mkdir(parents=True)
    (path / "unet" / "config.json").write_text(json.dumps({"sample_size": sample_size}))
    index = {"unet": ["diffusers", "UNet2DConditionModel"]}
    if levels is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        (path / "vae").mkdir()
        (path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8] * levels}))
    (path / "model_index.json").write_text(json.dumps(index))
    return str(path)


@pytest.mark.parametrize("name", [name for name in KNOWN_GUIDANCE if name != "embedded"] + ["owner/name"])
def test_published_models_have_settings_of_their_own(name: str) -> None:
    config = Config.for_guidance(name)
    assert config.guidance == GuidanceConfig(name=name)
    assert config.field == HashGridFieldConfig(mlp_dtype="auto")
    assert config.renderer == RendererConfig()
    assert (config.steps, config.batch, config.schedule.t_max_end) == (10_000, 1, 0.98)
    config.schedule.t_range(1.0)
    # Score distillation as in DreamFusion, and no losses but its own.
    assert [config.schedule.sds_share.at(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert config.loss.binary.at(1.0) == config.loss.sample_entropy.at(1.0) == 0.0
    assert Config.for_guidance("embedded") == Config()


def test_settings_win() -> None:
    config = Config.for_guidance("sdxl", prompt="a kite", steps=7, guidance=GuidanceConfig(name="sdxl", fused=False))
    assert (config.prompt, config.steps, config.guidance.fused) == ("a kite", 7, False)
    assert config.field == LARGE.field


@pytest.mark.parametrize(
    ("sample_size", "levels", "small"),
    [(64, 4, False), (32, 4, False), (16, 3, True), (16, None, True), (64, None, False), ("x", 4, False)],
)
def test_a_folder_says_how_large_its_model_is(tmp_path: Path, sample_size: Any, levels: int, small: bool) -> None:
    assert is_small(folder_of(tmp_path / "model", sample_size, levels)) == small


def test_a_known_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "sdxl", 16, 3)
    monkeypatch.chdir(tmp_path)
    assert not is_small("sdxl")
    assert is_small("./sdxl")


def test_what_cannot_be_read_counts_as_large(tmp_path: Path) -> None:
    assert not is_small(str(tmp_path))
    assert not is_small(str(tmp_path / "absent"))


def test_yaml_that_names_a_model(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("guidance:\n  name: stable-diffusion\nschedule:\n  render_size: 128\n")
    config = Config.load(path)
    assert (config.field, config.steps) == (LARGE.field, 10_000)
    assert config.schedule == dataclasses.replace(LARGE.schedule, render_size=128)
    assert Config.from_yaml(config.to_yaml()) == config, "a saved config says everything"
    path.write_text("steps: 5\n")
    assert Config.load(path) == Config(steps=5)
    assert Config.load(path, guidance="sdxl").field == LARGE.field


@pytest.mark.parametrize("form", [["--guidance.name", "sdxl"], ["--guidance.name=sdxl"]])
def test_the_command_line(tmp_path: Path, made: list[Config], form: list[str]) -> None:
    assert main(["generate", "a kite", *form, "--steps", "9", "--device", "cpu"]) == 130
    path = tmp_path / "run.yaml"
    path.write_text("batch: 3\n")
    assert main(["generate", "a kite", "--config", str(path), *form, "--device", "cpu"]) == 130
    assert main(["generate", "a kite", "--device", "cpu"]) == 130
    first, second, third = made
    assert first == Config.for_guidance("sdxl", prompt="a kite", steps=9, device="cpu")
    assert second == Config.for_guidance("sdxl", prompt="a kite", batch=3, device="cpu")
    assert third == Config(prompt="a kite", device="cpu")


def test_a_generator_with_a_prompt_alone() -> None:
    config = GuidanceConfig(name="stable-diffusion-1.5", guidance_scale=30.0)
    generator = Generator("a kite", guidance=config, device="cpu", batch=2)
    assert generator.config == Config.for_guidance(config.name, prompt="a kite", guidance=config, device="cpu", batch=2)
    assert Generator(Config(prompt="a kite", device="cpu"), guidance=config).config.field == Config().field

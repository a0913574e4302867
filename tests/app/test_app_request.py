"""Requests from the page become settings, or one line on why they cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamfusion_fast import cli
from dreamfusion_fast.app.request import config_of, guidance_names, pictures_of
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.config import Config


def test_the_defaults_are_those_of_the_command_line() -> None:
    config, default = config_of(" an  armchair\n"), Config(prompt="an armchair")
    assert config.log.preview_every == 25
    assert config.log.preview_every < default.log.preview_every
    assert {**config.to_dict(), "log": None} == {**default.to_dict(), "log": None}


def test_all_can_be_given() -> None:
    config = config_of("a cup", "threestudio-sd", "stable-diffusion-1.5", "30.5", "7", "12", device="cpu")
    preset = Config.from_preset("threestudio-sd")
    assert (config.prompt, config.seed, config.steps, config.device) == ("a cup", 7, 12, "cpu")
    assert (config.guidance.name, config.guidance.guidance_scale) == ("stable-diffusion-1.5", 30.5)
    assert config.optim == preset.optim
    assert config.log.preview_every == 10
    assert config_of("x", None, "sdxl").steps == Config.for_guidance("sdxl").steps
    assert config_of("x", None, "my/model", own=["my/model"]).guidance.name == "my/model"
    assert guidance_names(["my/model", "sdxl"])[-1] == "my/model"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "x" * 501}, "prompt: got 501 letters, want at most 500"),
        ({"prompt": "a\x1b[2J"}, "want text that can be printed"),
        ({"prompt": "a\udc80"}, "want text that can be printed"),
        ({"preset": "../x"}, "preset: got '../x', want one of "),
        ({"guidance": "/etc"}, "guidance: got '/etc', want one of embedded"),
        ({"guidance": ["embedded"]}, "guidance: got "),
        ({"scale": "much"}, "guidance scale: got 'much', want a number"),
        ({"scale": "nan"}, "guidance scale: got 'nan', want a number"),
        ({"seed": -1}, "seed: got -1, want 0 to "),
        ({"seed": 1.5}, "seed: got 1.5, want a whole number"),
        ({"steps": "0"}, "steps: got 0, want at least 1"),
        ({"steps": True}, "steps: got True, want a number"),
        ({"steps": "1e999"}, "steps: got '1e999', want a number"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(**{"prompt": "a cup", **given})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def script(folder: Path, text: str) -> list[str]:
    path = folder / "draw.py"
    path.write_text(f"import sys, json\nfrom pathlib import Path\n{text}\n")
    return [sys.executable, str(path)]


def test_pictures_are_asked_of_sample_with_the_prompt_as_one_word(tmp_path: Path) -> None:
    command = script(tmp_path, f"Path({str(tmp_path / 'said')!r}).write_text(json.dumps(sys.argv[1:]))")
    pictures_of('--out=x "$(y)"', 3.0, tmp_path / "a.png", "cpu", command)
    said = (tmp_path / "said").read_text()
    assert said.startswith('["sample", "--out=')
    assert said.endswith('"--device=cpu", "--seed=3", "--", "--out=x \\"$(y)\\""]')


def test_sample_has_these_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script(tmp_path, f"Path({str(tmp_path / 'said')!r}).write_text(json.dumps(sys.argv[1:]))")
    pictures_of("-a chair", 1, tmp_path / "a.png", "cpu", command)
    asked: list[Any] = []

    def sample_images(*arguments: Any) -> np.ndarray[Any, Any]:
        asked.extend(arguments)
        return np.zeros((4, 8, 8, 3), np.uint8)

    sample = "dreamfusion_fast.guidance.models.embedded.sample"
    monkeypatch.setitem(sys.modules, sample, SimpleNamespace(sample_images=sample_images))
    assert cli.main(json.loads((tmp_path / "said").read_text())) == 0
    assert asked == ["-a chair", 4, 1, 3.0, 20, "cpu", None]
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_why_there_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures: out of memory"):
        pictures_of("x", 0, tmp_path / "a.png", "cpu", script(tmp_path, "print('a'); sys.exit('error: out of memory')"))
    with pytest.raises(UserError, match="no pictures: it said nothing"):
        pictures_of("x", 0, tmp_path / "a.png", "cpu", script(tmp_path, "sys.exit(1)"))
    with pytest.raises(UserError, match="prompt is empty"):
        pictures_of("", 0, tmp_path / "a.png")

"""Whole runs under pipelines in diffusers' format, tiny ones made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loras
import pytest
import torch

from dreamfusion_fast import Generator
from dreamfusion_fast.fields import HashGridFieldConfig
from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.rendering import RendererConfig
from dreamfusion_fast.training.callbacks import Callback
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.sections import ExportConfig, LogConfig, ScheduleConfig

Pipelines = Callable[..., Path]


def config_for(pipeline: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "prompt": "a red chair",
        "steps": 6,
        "device": "cpu",
        "guidance": GuidanceConfig(name=str(pipeline), dtype="float32"),
        "field": HashGridFieldConfig(levels=3, log2_rows=9, finest_resolution=24, hidden=8),
        "renderer": RendererConfig(samples_across=24),
        "schedule": ScheduleConfig(render_size_start=8, render_size=16),
        "log": LogConfig(preview_every=0, tensorboard=False, progress_bar=False),
        "export": ExportConfig(
            resolution=16, texture_size=32, target_faces=200, turntable_frames=0, turntable_size=16, preview_views=1
        ),
    }
    return Config(**settings | changes)


class StopAfter(Callback):
    """As Ctrl-C does, between two steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, result: Any) -> None:
        if result.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[(kind, "sds") for kind in ("latent", "pixel", "sdxl", "sd3", "flux")],
        *[(kind, "vsd") for kind in ("latent", "pixel", "sdxl")],
        ("latent", "sdi"),
        ("pixel", "ism"),
        ("sd3", "rfds"),
        ("flux", "ism"),
    ],
)
def test_a_run_that_was_stopped_goes_on_where_it_was(
    pipeline: Pipelines, kind: str, mode: Any, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    """To the bit, optimiser and random numbers included; and it says what it loads."""
    torch.set_num_threads(1)
    guidance = GuidanceConfig(name=str(pipeline(kind)), dtype="float32", mode=mode)
    config = config_for(pipeline(kind), log=LogConfig(0, 2, False, progress_bar=False), guidance=guidance)
    whole = Generator(config, out=str(tmp_path / "whole")).run()
    assert f"loading {pipeline(kind)}" in said()
    assert whole.mesh.faces > 0
    with pytest.raises(KeyboardInterrupt):
        Generator(config, out=str(tmp_path / "parts"), callbacks=[StopAfter(4)]).run()
    stopped = load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")
    assert 0 < stopped.step < 6
    Generator.resume(tmp_path / "parts").run()
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert a.step == b.step == 6
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    trained = [value for name, value in a.tensors.items() if name.startswith("guidance.lora")]
    assert bool(trained) == (mode == "vsd")
    assert all(float(value.abs().max()) > 0 for value in trained)
    assert any(not torch.equal(a.tensors[name], stopped.tensors[name]) for name in a.tensors)


@pytest.mark.slow
def test_a_run_with_a_lora_goes_on_with_it(
    pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """From another folder than the one that it was started in; and it says when the file is no longer the same."""
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(1)
    folder, file = pipeline("latent"), tmp_path / "a.safetensors"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    loras.kohya(file, {"lora_unet": loras.pairs(unet, loras.UNET_LAYERS)})
    monkeypatch.chdir(tmp_path)
    guidance = GuidanceConfig(name=str(folder), dtype="float32", lora=("a.safetensors:0.5",))
    config = config_for(folder, steps=4, guidance=guidance)
    Generator(config, out="whole").run()
    with pytest.raises(KeyboardInterrupt):
        Generator(config, out="parts", callbacks=[StopAfter(2)]).run()
    without = config_for(folder, steps=4, guidance=GuidanceConfig(name=str(folder), dtype="float32"))
    Generator(without, out="without").run()
    monkeypatch.chdir("/")
    Generator.resume(tmp_path / "parts").run()
    tensors = [load_checkpoint(tmp_path / name / "checkpoint.safetensors").tensors for name in ("whole", "parts")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    other = load_checkpoint(tmp_path / "without" / "checkpoint.safetensors").tensors
    assert any(not torch.equal(tensors[0][name], other[name]) for name in other)
    assert not any("has changed" in line for line in said())
    loras.kohya(file, {"lora_unet": loras.pairs(unet, loras.UNET_LAYERS, seed=1)})
    Generator.resume(tmp_path / "parts").run()
    assert any(f"{file} has changed since this run began" in line for line in said())

"""Callbacks: when they act and what they leave."""

from __future__ import annotations

import dataclasses
import io
import sys
import threading

import numpy as np
import pytest
import torch
from fakes import BallGuidance, small_config
from PIL import Image

from dreamfusion_fast.errors import NonFiniteError
from dreamfusion_fast.io import RunFolder
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.training.callbacks import (
    PREVIEW_SIZE,
    PREVIEW_VIEWS,
    Callback,
    Checkpoints,
    Curves,
    Preview,
    ProgressBar,
    Shown,
    due,
)
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.trainer import StepResult, Trainer


@pytest.fixture
def trainer():
    return Trainer(small_config(steps=7), torch.device("cpu"), BallGuidance())


def run(trainer, callback, steps=7):
    callback.on_start(trainer)
    for _ in range(steps):
        callback.on_step(trainer, trainer.step())
    callback.on_end(trainer)


def test_due():
    def steps(every, last):
        return [k for k in range(1, 11) if due(StepResult(k, {}, Shading.ALBEDO, 8, 0), every, last)]

    assert steps(4, 10) == [4, 8, 10]
    assert steps(4, 0) == [4, 8]
    assert steps(1, 10) == list(range(1, 11))
    assert steps(0, 10) == []


def test_preview_shows_colour_above_shape(trainer, tmp_path):
    path = tmp_path / "preview.png"
    run(trainer, Preview(path, 4), steps=3)
    assert not path.exists()
    run(trainer, Preview(path, 4), steps=1)
    picture = Image.open(path)
    assert picture.size == (PREVIEW_VIEWS * PREVIEW_SIZE, 2 * PREVIEW_SIZE)
    colored, lit = (picture.crop((0, y, picture.width, y + PREVIEW_SIZE)) for y in (0, PREVIEW_SIZE))
    assert colored.getpixel((0, 0)) == lit.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = lit.getpixel((PREVIEW_SIZE // 2, PREVIEW_SIZE // 2))
    assert red == green == blue < 250
    assert len(set(colored.getpixel((PREVIEW_SIZE // 2, PREVIEW_SIZE // 2)))) > 1
    assert [file.name for file in tmp_path.iterdir()] == ["preview.png"]


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def read_scalars(folder):
    events = read_events(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_hold_the_losses(trainer, tmp_path):
    curves, losses = Curves(tmp_path, 3), {}
    curves.on_start(trainer)
    for _ in range(7):
        result = trainer.step()
        losses[result.step] = {name: float(value) for name, value in result.losses.items()}
        curves.on_step(trainer, result)
    curves.on_end(trainer)
    scalars = read_scalars(tmp_path)
    assert scalars["loss/sds"] == [(step, pytest.approx(losses[step]["sds"])) for step in (3, 6, 7)]
    assert {"loss/opacity", "loss/ray_entropy", "render/samples", "render/occupied"} <= scalars.keys()
    assert 0 < scalars["render/occupied"][-1][1] <= 1


def test_curves_of_a_resumed_run_hold_each_step_once(trainer, tmp_path):
    """Points written after the checkpoint are written again."""
    run(trainer, Curves(tmp_path, 1), steps=5)
    trainer.steps_done = 3
    run(trainer, Curves(tmp_path, 1), steps=4)
    assert [step for step, _ in read_scalars(tmp_path)["loss/sds"]] == [1, 2, 3, 4, 5, 6, 7]


def test_curves_hold_the_previews(trainer, tmp_path):
    preview = Preview(tmp_path / "preview.png", 3)
    curves = Curves(tmp_path / "t", 5, preview)
    curves.on_start(trainer)
    for _ in range(7):
        result = trainer.step()
        preview.on_step(trainer, result)
        curves.on_step(trainer, result)
    curves.on_end(trainer)
    events = read_events(tmp_path / "t")
    pictures = events.Images("preview")
    assert [picture.step for picture in pictures] == [3, 6]
    shown = Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    assert np.array_equal(np.array(shown), np.array(Image.open(tmp_path / "preview.png")))
    assert [event.step for event in events.Scalars("loss/sds")] == [5, 7]


def test_curves_that_never_started_can_end(trainer, tmp_path):
    Curves(tmp_path / "t", 1).on_end(trainer)
    assert not (tmp_path / "t").exists()


def test_checkpoints_come_regularly_and_at_the_end(trainer, tmp_path):
    folder, seen = RunFolder(tmp_path), []
    checkpoints = Checkpoints(folder, 3)
    for _ in range(7):
        checkpoints.on_step(trainer, trainer.step())
        seen.append(load_checkpoint(folder.checkpoint).step if folder.checkpoint.exists() else 0)
    assert seen == [0, 0, 3, 3, 3, 6, 7]
    written = folder.checkpoint.stat().st_mtime_ns
    checkpoints.save(trainer)
    assert folder.checkpoint.stat().st_mtime_ns == written  # this step's is there


def test_a_checkpoint_with_nan_is_not_written(trainer, tmp_path):
    folder = RunFolder(tmp_path)
    checkpoints = Checkpoints(folder, 1)
    checkpoints.on_step(trainer, trainer.step())
    before = folder.checkpoint.read_bytes()
    result = trainer.step()
    with torch.no_grad():
        trainer.scene.field.table[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"field\.table"):
        checkpoints.on_step(trainer, result)
    assert folder.checkpoint.read_bytes() == before


def test_progress_bar_shows_rate_and_losses(trainer, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr("sys.stdout", printed)
    monkeypatch.setenv("COLUMNS", "80")
    trainer.config = dataclasses.replace(trainer.config, prompt="a [red] ball beside a blue one")
    run(trainer, ProgressBar(2))
    bar, losses = (line.strip() for line in printed.getvalue().strip().splitlines())
    for words in ("a [red] ball...", "7/7", "it/s", "left"):
        assert words in bar
    for words in ("sds 0.", "opacity 0.", "ray_entropy 0."):
        assert words in losses


def test_progress_bar_that_never_started_can_end(trainer):
    ProgressBar(1).on_end(trainer)


@pytest.mark.parametrize("method", ["on_start", "on_step", "on_end"])
def test_what_only_shows_is_switched_off_where_it_fails(trainer, said, method):
    class Broken(Callback):
        told: list[str] = []  # noqa: RUF012

        def __getattribute__(self, name):
            if name.startswith("on_"):
                self.told.append(name)
                if name == method:
                    raise OSError(28, "No space left on device")
            return super().__getattribute__(name)

    broken = Broken()
    run(trainer, Shown("picture", broken), steps=3)
    told = {"on_start": ["on_start"], "on_step": ["on_start", "on_step"], "on_end": ["on_start"] + ["on_step"] * 3}
    assert broken.told == told[method] + (["on_end"] if method != "on_end" else ["on_end", "on_end"])
    assert said() == ["picture: switched off, the run goes on (OSError: [Errno 28] No space left on device)"]


def test_a_progress_bar_that_cannot_be_written_is_switched_off(trainer, monkeypatch, said):
    """Without an error in the thread that draws it, nor an exit by rich."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    threads = threading.enumerate()
    monkeypatch.setattr("sys.stdout", Terminal())
    run(trainer, Shown("progress bar", ProgressBar(1)))
    assert said() == ["progress bar: switched off, the run goes on (BrokenPipeError: [Errno 32] Broken pipe)"]
    assert threading.enumerate() == threads
    assert isinstance(sys.stdout, Terminal)


def test_a_checkpoint_that_cannot_be_written_is_tried_again(trainer, tmp_path, monkeypatch, said):
    folder = RunFolder(tmp_path)
    checkpoints = Checkpoints(folder, 2)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    for step in range(1, 7):
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr("dreamfusion_fast.training.callbacks.save_checkpoint", full)
            checkpoints.on_step(trainer, trainer.step())
        assert step == 1 or load_checkpoint(folder.checkpoint).step == checkpoints.step
        assert checkpoints.step == {1: 0, 4: 2, 5: 2}.get(step, step - step % 2)
    assert said() == [
        "no checkpoint of step 4, that of step 2 is kept (OSError: [Errno 28] No space left on device)",
    ]

"""From a prompt to files by the command line, on the embedded prior's code with a network of few, random weights."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from fakes import look_small, small_config, use_prior, write_tiny_prior
from PIL import Image
from safetensors import SafetensorError, safe_open

from dreamfusion_fast import cli
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.config import Config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(autouse=True)
def surroundings(weights, tmp_path, monkeypatch):
    """The small prior, one thread, and no cache of the person who runs the tests."""
    use_prior(weights, monkeypatch)
    look_small(monkeypatch)
    monkeypatch.setenv("DREAMFUSION_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DREAMFUSION_FAST_DEBUG", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "small.yaml"
    small_config(prompt="", steps=3).save(file)
    return file


def fails(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 1
    return printed[printed.index("error: ") :]


def frames_of(video):
    reader = imageio_ffmpeg.read_frames(str(video))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def test_generate_then_export_then_sample(tmp_path, config_file, capsys):
    out = tmp_path / "out" / "armchair"
    arguments = ["generate", "an armchair", "--config", str(config_file), "--out", str(out)]
    assert cli.main([*arguments, "--log.tensorboard", "--log.progress-bar", "--log.preview-every", "2"]) == 0
    printed = capsys.readouterr().out
    assert "an armchair" in printed
    for words in ("3/3", "it/s", "sds ", "opacity "):
        assert words in printed
    assert printed.endswith(f"done: {out}\n")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors",
        "config.yaml",
        "mesh.glb",
        "preview.png",
        "tensorboard",
        "turntable.mp4",
    ]
    mesh = trimesh.load(out / "mesh.glb", force="mesh")
    assert len(mesh.faces) > 50
    assert np.abs(mesh.vertices).max() <= 1.0
    assert mesh.visual.material.baseColorTexture.size == (64, 64)
    frames = frames_of(out / "turntable.mp4")
    assert [frame.shape for frame in frames] == [(32, 32, 3)] * 3
    assert frames[0][0, 0].min() > 240  # white behind
    assert frames[0][16, 16].min() < 230
    assert Image.open(out / "preview.png").size == (64, 32)
    assert any((out / "tensorboard").iterdir())
    assert Config.load(out / "config.yaml").prompt == "an armchair"
    assert load_checkpoint(out / "checkpoint.safetensors").step == 3

    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert "already holds a run" in fails(capsys, *arguments)
    other = tmp_path / "finer"
    assert cli.main(["export", str(out), "--resolution", "40", "--turntable-frames", "0", "--out", str(other)]) == 0
    assert sorted(path.name for path in other.iterdir()) == ["mesh.glb", "preview.png"]
    assert len(trimesh.load(other / "mesh.glb", force="mesh").faces) > len(mesh.faces)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    grid = tmp_path / "grid.png"
    assert cli.main(["sample", "an armchair", "-n", "2", "--steps", "2", "--out", str(grid), "--device", "cpu"]) == 0
    assert Image.open(grid).size == (128, 64)


@pytest.mark.slow
def test_resume_of_a_finished_run_goes_on(tmp_path, config_file):
    out = tmp_path / "run"
    assert cli.main(["generate", "a cup", "--config", str(config_file), "--out", str(out)]) == 0
    assert cli.main(["generate", "--resume", str(out), "--steps", "5"]) == 0
    assert load_checkpoint(out / "checkpoint.safetensors").step == 5
    assert Config.load(out / "config.yaml").steps == 5


def test_bad_input_changes_nothing(tmp_path, config_file, capsys):
    out = tmp_path / "run"
    assert cli.main(["generate", "a cup", "--config", str(config_file), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    new = tmp_path / "new"
    started = ("generate", "a cup", "--config", config_file, "--out", new)
    assert "the prompt is empty" in fails(capsys, "generate", "", "--out", new)
    assert "no-such-model" in fails(capsys, *started, "--guidance.name", "no-such-model")
    (tmp_path / "folder").mkdir()
    assert "folder" in fails(capsys, *started, "--guidance.name", tmp_path / "folder")
    assert "of another config (field.levels: 4, here 5)" in fails(
        capsys, "generate", "--resume", out, "--field.levels", "5"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    checkpoint = out / "checkpoint.safetensors"
    damaged = bytearray(checkpoint.read_bytes())
    damaged[-1000] ^= 1
    checkpoint.write_bytes(damaged)
    assert "is corrupt (its checksum is wrong)" in fails(capsys, "generate", "--resume", out)
    assert "is corrupt (its checksum is wrong)" in fails(capsys, "export", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {checkpoint.name: bytes(damaged)}
    assert not new.exists() or not any(new.iterdir())


def test_nan_in_training_is_one_line_and_keeps_the_checkpoint(tmp_path, config_file, capsys, monkeypatch):
    from dreamfusion_fast.guidance.models.embedded import guide

    prior = guide.EmbeddedPrior.func  # the fixture has put a partial in its place
    calls, evaluate = [], prior.evaluate

    def broken(self, noisy, *rest):
        calls.append(noisy)
        return evaluate(self, noisy, *rest) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(prior, "evaluate", broken)
    out = tmp_path / "run"
    every = ("--log.checkpoint-every", "1")
    line = fails(capsys, "generate", "a cup", "--config", config_file, "--out", out, *every)
    assert "NaN" in line
    assert f"the last good checkpoint is {out / 'checkpoint.safetensors'}" in line
    assert load_checkpoint(out / "checkpoint.safetensors").step == 2
    assert not (out / "mesh.glb").exists()


RUN = """
import sys
sys.path[:0] = sys.argv[1:2]
import torch
from pathlib import Path
from fakes import use_prior
from dreamfusion_fast.cli import main
torch.set_num_threads(1)
use_prior(Path(sys.argv[2]))
sys.exit(main(sys.argv[3:]))
"""


def saved_step(checkpoint):
    try:
        with safe_open(checkpoint, framework="pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError):
        return -1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_ctrl_c_of_the_command_and_resume(tmp_path, weights, config_file):
    out = tmp_path / "a run"
    options = ["--steps", "100000", "--log.checkpoint-every", "1", "--config", str(config_file), "--out", str(out)]
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(weights), "generate", "a cup", *options]
    # From where the package under test lies: `python -c` would find an uncompiled source tree in the working folder.
    folder = Path(cli.__file__).parents[1]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while saved_step(out / "checkpoint.safetensors") < 2 and process.poll() is None:
            assert time.monotonic() < deadline, "the run did not get to its second step"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    done = load_checkpoint(out / "checkpoint.safetensors").step
    assert 2 <= done < 100000
    said = f"stopped after step {done} of 100000; continue: dreamfusion-fast generate --resume '{out}'"
    assert said in errors
    assert "Traceback" not in errors
    assert not (out / "mesh.glb").exists()

    assert cli.main(["generate", "--resume", str(out), "--steps", str(done + 2)]) == 0
    assert load_checkpoint(out / "checkpoint.safetensors").step == done + 2
    assert (out / "mesh.glb").exists()


@pytest.mark.slow
def test_generator_s_example(monkeypatch, tmp_path):
    from dreamfusion_fast.training import generator

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    results = doctest.testmod(generator)
    assert results.failed == 0
    assert results.attempted > 4

"""Files that are damaged, lost, not to be written, or of which only a part could be written."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import BallGuidance, small_config
from safetensors.torch import load_file, save_file

import dreamfusion_fast
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export import render_turntable
from dreamfusion_fast.training import checkpoint
from dreamfusion_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.sections import ExportConfig

EXPORT = ExportConfig(16, texture_size=32, turntable_frames=0, turntable_size=16, preview_views=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one step, to be copied."""
    folder = tmp_path_factory.mktemp("made") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Generator(small_config(out=str(folder), steps=1, export=EXPORT), guidance=BallGuidance()).run()
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(made, tmp_path, one_thread):
    """A run of one step."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def metadata_of(path):
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


def test_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.ones(3, dtype=torch.bfloat16)}
    save_checkpoint(path, tensors=tensors, config=Config(prompt="ein Stühlchen"), step=7, meta={"x": [1, 2.5, None]})
    data = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(data)), 800):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value), bit


@pytest.mark.slow
def test_a_checkpoint_of_the_first_format_is_read(run, monkeypatch):
    path, both = run / "checkpoint.safetensors", checkpoint._checksum
    now = load_checkpoint(path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 1)
        patch.setattr(checkpoint, "_checksum", lambda tensors, metadata: both(tensors, {}))
        save_checkpoint(path, tensors=now.tensors, config=now.config, step=now.step, meta=now.meta)
    assert metadata_of(path)["version"] == "1"
    assert load_checkpoint(path).meta == now.meta
    assert Generator.resume(run, guidance=BallGuidance()).run().steps == 1


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"optimizer": None},
        {"optimizer": []},
        {"optimizer": {"values": 3, "param_groups": []}},
        {"optimizer": {"values": {"x": {}}, "param_groups": []}},
        {"optimizer": {"values": {}, "param_groups": 7}},
        {"optimizer": {"values": {}, "param_groups": [{"betas": 1}]}},
    ],
    ids=str,
)
def test_metadata_of_a_wrong_form_is_one_line(run, meta):
    path = run / "checkpoint.safetensors"
    good = load_checkpoint(path)
    save_checkpoint(path, tensors=good.tensors, config=good.config, step=1, meta=meta)
    with pytest.raises(UserError, match=r"does not fit this config: .") as error:
        Generator.resume(run, guidance=BallGuidance()).run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong", [{"meta": "[1]"}, {"meta": "3"}, {"meta": "[" * 100_000}, {"step": "-1"}, {"step": "x"}, {"checksum": ""}]
)
def test_metadata_of_a_wrong_type_is_one_line(run, wrong):
    path = run / "checkpoint.safetensors"
    save_file(load_file(path), path, metadata=metadata_of(path) | wrong)
    with pytest.raises(UserError, match="is corrupt \\(bad metadata") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_tensors_of_a_wrong_form_are_one_line(run):
    path = run / "checkpoint.safetensors"
    good = load_checkpoint(path)
    for name in ("generator", "field.table", "optimizer.0.exp_avg"):
        other = good.tensors | {name: torch.zeros(3)}
        save_checkpoint(path, tensors=other, config=good.config, step=1, meta=good.meta)
        with pytest.raises(UserError, match="checkpoint") as error:
            Generator.resume(run, guidance=BallGuidance()).run()
        assert "\n" not in str(error.value)


def test_a_lost_config_is_written_again(run):
    before = (run / "config.yaml").read_bytes()
    (run / "config.yaml").unlink()
    Generator.resume(run, guidance=BallGuidance()).run()
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_a_run_is_made_once(run, tmp_path):
    generator = Generator.resume(run, guidance=BallGuidance())
    generator.run()
    with pytest.raises(UserError, match=r"this Generator has run; continue with Generator\.resume"):
        generator.run()
    assert (generator.export().faces, sorted(os.listdir(run))[0]) == (
        generator.export(run).faces,
        "checkpoint.safetensors",
    )


@pytest.mark.slow
def test_export_to_elsewhere_only_reads_the_run(run, tmp_path, capsys):
    """As where the run's folder is on a read-only disk: permission bits do not bind every user."""
    program = """
import os, sys
from dreamfusion_fast import cli
run = sys.argv[1]
def hook(event, arguments):
    below = bool(arguments) and isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(run)
    writes = event == "open" and below and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or below and event in ("os.mkdir", "os.rename", "os.remove", "os.chmod", "os.truncate"):
        raise PermissionError(30, "Read-only file system", run)
sys.addaudithook(hook)
sys.exit(cli.main(["export", run, "--device", "cpu", "--turntable-frames", "0", *sys.argv[2:]]))
"""
    folder = Path(dreamfusion_fast.__file__).parents[1]
    command = [sys.executable, "-c", program, str(run)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "b")], cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "b")) == ["mesh.glb", "preview.png"]
    refused = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "Read-only file system" in refused.stderr


def noise(azimuth):
    return np.random.default_rng(int(azimuth)).integers(0, 256, (128, 128, 3)).astype(np.uint8)


@pytest.mark.parametrize("bytes_left", [10, 10_000, 100_000])
def test_a_video_that_is_cut_off_is_none(tmp_path, bytes_left):
    """A limit on the size of files does what a full disk does, to ffmpeg alone."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        with pytest.raises(UserError, match="ffmpeg failed with status"):
            render_turntable(noise, tmp_path / "a.mp4", n_frames=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_a_bad_rate_is_no_video(tmp_path):
    for fps in (10**20, float("nan")):
        with pytest.raises(UserError, match=r"ffmpeg failed with status \d+ \(.*\)"):
            render_turntable(noise, tmp_path / "a.mp4", n_frames=2, fps=fps)
    with pytest.raises(ValueError, match="fps has to be at least 1, not 0"):
        render_turntable(noise, tmp_path / "a.mp4", n_frames=2, fps=0)
    assert os.listdir(tmp_path) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("ffmpeg", ["/nonexistent", "/bin/true", "/bin/false", "/etc/passwd"])
def test_a_bad_ffmpeg_costs_the_video_alone(tmp_path, ffmpeg, monkeypatch, one_thread, said):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg)
    export = dataclasses.replace(EXPORT, turntable_frames=2)
    generator = Generator(small_config(out=str(tmp_path / "run"), steps=1, export=export), guidance=BallGuidance())
    generator.run()
    (line,) = [line for line in said() if "turntable.mp4" in line]
    assert re.match(r"no turntable\.mp4 \(.*ffmpeg.*\); the mesh is there, and dreamfusion-fast export", line)
    assert "\n" not in line
    names = ["checkpoint.safetensors", "config.yaml", "mesh.glb", "preview.png"]
    assert sorted(os.listdir(tmp_path / "run")) == names


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize("before", ["", "from dreamfusion_fast.ops import ray_box"])
def test_the_first_op_in_a_forked_process(before):
    """Its parent has used the threads of torch, which the child does not have, and not our core."""
    program = f"""
import os, torch
{before}
torch.set_num_threads(3)
rays = torch.zeros(100_000, 3), torch.ones(100_000, 3), torch.tensor([-1.0, -1, -1, 1, 1, 1])
torch.rand(4_000_000).mul(2.0).add_(1)
assert len(os.listdir("/proc/self/task")) > 1
child = os.fork()
if child == 0:
    from dreamfusion_fast.ops import ray_box
    os._exit(0 if ray_box(*rays)[1][::100].eq(1).all() else 1)  # torch hangs in large ops
assert os.waitpid(child, 0)[1] == 0
"""
    folder = Path(dreamfusion_fast.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", program], cwd=folder, start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

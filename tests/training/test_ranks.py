"""One object by two processes: as by one, and both have the same to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
import torchrun_steps
from fakes import use_prior, write_tiny_prior

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.ranks import Ranks, joined_ranks, started_by_torchrun
from dreamfusion_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def torchrun(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start two processes, as the documentation says."""
    paths = [str(Path(__file__).parent), str(Path(fakes.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"DREAMFUSION_FAST_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def done(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


@pytest.mark.slow
def test_two_processes_do_the_steps_of_one(tmp_path: Path, one_thread: None, monkeypatch: Any) -> None:
    """Three views: one process has one of them, the other two."""
    prior = write_tiny_prior(tmp_path / "prior")
    process = torchrun(tmp_path, torchrun_steps.__file__, str(tmp_path), str(prior))
    use_prior(prior, monkeypatch)
    alone = torchrun_steps.result(Trainer(torchrun_steps.config(), CPU))
    assert alone["shadings"] == 3  # so that normals and lights were among it
    background = alone["state"]["optimizer.6.step"]
    assert 0 < background < torchrun_steps.STEPS  # and learned and plain backgrounds
    done(process)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["state"].keys() == alone["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert torch.equal(second["shared"], torch.full((3, 2), 5.0))
    assert first["losses"] == second["losses"]
    assert torch.equal(first["state"]["generator"], alone["state"]["generator"])
    for ours, theirs in zip(first["losses"], alone["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, value in alone["state"].items():
        difference = (first["state"][name].double() - value.double()).abs().max()
        assert difference <= 5e-5 * value.double().abs().max(), name


def test_a_share_of_the_views_is_rendered_as_in_the_whole_batch(one_thread: None) -> None:
    """The jitter of a ray depends on its number, which it keeps."""
    config = torchrun_steps.config()
    for rank in range(2):
        whole, part = (Trainer(config, CPU, fakes.BallGuidance(), ranks=ranks) for ranks in (None, Ranks(rank, 2, CPU)))
        drawn = [trainer._sampler.draw(12, 0.0, trainer.scene.renderer) for trainer in (whole, part)]
        colors = [
            trainer._render_training(views, {}).color.view(3, 12, 12, 3)
            for trainer, views in zip((whole, part), drawn, strict=True)
        ]
        assert torch.equal(colors[0][part._own], colors[1][part._own])


@pytest.mark.parametrize(("batch", "count"), [(3, 2), (8, 8), (7, 3)])
def test_every_view_is_someones(batch: int, count: int) -> None:
    shares = [Ranks(rank, count, CPU).views(batch) for rank in range(count)]
    assert [view for share in shares for view in range(batch)[share]] == list(range(batch))
    assert min(share.stop - share.start for share in shares) >= 1


def test_what_cannot_be_shared_is_one_line(monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="--batch: got 2 views per step for 3 processes, want one each at least"):
        Trainer(fakes.small_config(batch=2), CPU, fakes.BallGuidance(), ranks=Ranks(0, 3, CPU))
    guidance = fakes.BallGuidance()
    weight = torch.nn.Parameter(torch.zeros(2))
    guidance.parameter_groups = lambda: [{"params": [weight], "lr": 0.1}]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="guidance 'ball' trains something, which only one process can"):
        Trainer(fakes.small_config(), CPU, guidance, ranks=Ranks(0, 2, CPU))
    with pytest.raises(UserError, match="--device: got cuda:1, want auto, cuda or cpu"), joined_ranks("cuda:1"):
        pass
    assert not started_by_torchrun()


def command(out: Path, *words: str) -> list[str]:
    """`generate` in a few seconds, by the embedded prior."""
    small = "--field.levels 4 --field.finest-resolution 32 --field.log2-rows 12 --field.hidden 16 --firm.steps 2"
    small += " --export.resolution 32 --export.texture-size 64 --export.turntable-frames 0 --export.preview-views 1"
    small += " --schedule.render-size 16 --schedule.render-size-start 16 --log.no-progress-bar --log.preview-every 0"
    module = ["-m", "dreamfusion_fast.cli", "generate", "a ball", "--device", "cpu", "--out", str(out)]
    return [*module, *small.split(), *words]


@pytest.mark.slow
def test_the_command_writes_once_and_stops_and_resumes_together(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = torchrun(tmp_path, *command(out, "--steps", "100000", "--log.checkpoint-every", "1"))
    checkpoint = out / "checkpoint.safetensors"
    for _ in range(1200):
        if process.poll() is not None or (checkpoint.exists() and load_checkpoint(checkpoint).step > 0):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    printed, _ = process.communicate(timeout=120)
    assert "stopped after step" in printed
    assert not (out / "mesh.glb").exists()
    resumed = torchrun(tmp_path, "-m", "dreamfusion_fast.cli", "generate", "--resume", str(out), "--steps", "6")
    printed = done(resumed)
    assert printed.count("done: ") == 1
    assert (out / "mesh.glb").is_file()
